"""Replays over seeds: paired, since every system serves the same requests at the same times under one seed.

Where nothing is drawn, since a file records its arrivals, every seed would replay the same: then there is one replay.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.record.record import Frames
from kvarena.harness.run.run import Run


def seeds_of(run: Run) -> list[int]:
    """The seeds to replay. Raises UserError for none, one twice, or one below 0."""
    seeds: list[int] = list(run.params.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"params.seeds={seeds}: at least one seed, each 0 or more, and none twice")
    return seeds if _draws(run) else seeds[:1]


def _draws(run: Run) -> bool:
    return run.arrival.process != "recorded" or bool(run.trace.mix)


def unread_seeds(run: Run) -> dict[str, str]:
    """The seeds that `params.seeds` stands in for, and itself where nothing is drawn."""
    keys = {key: "params.seeds=[...] are the seeds of trace and arrivals" for key in ("trace.seed", "arrival.seed")}
    return keys if _draws(run) else {**keys, "params.seeds": "arrivals are recorded, so that no seed draws anything"}


def seeded(run: Run, seed: int) -> Run:
    """The run under one seed: of what a trace draws, and of its arrivals."""
    return replace(run, trace=replace(run.trace, seed=seed), arrival=replace(run.arrival, seed=seed))


def frames_of_seeds(cells: Sequence[Frames], first_seed: int) -> Frames:
    """The averages of every seed; requests and memory over time of the first, which would be too large otherwise."""
    frames = {name: pd.concat([cell[name] for cell in cells], ignore_index=True) for name in cells[0]}
    return {n: t if n == "averages" else t[t.seed == first_seed].reset_index(drop=True) for n, t in frames.items()}

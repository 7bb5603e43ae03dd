"""Replays over seeds: paired, since every system serves the same requests at the same times under one seed.

Where nothing is drawn, since a file records its arrivals, every seed would replay the same: then there is one replay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.record.record import Frames
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.run.published import is_earned
from kvarena.harness.run.run import P, Run


@runtime_checkable
class Seeded(Protocol):
    """Params of an experiment that replays over seeds."""

    @property
    def seeds(self) -> Sequence[int]:
        """Of traces and arrivals."""


def seeds_of(run: Run[Seeded]) -> list[int]:
    """The seeds to replay. Raises UserError for none, one twice, or one below 0."""
    seeds = list(run.params.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"params.seeds={seeds}: at least one seed, each 0 or more, and none twice")
    return seeds if _draws(run) else seeds[:1]


def _draws(run: Run[object]) -> bool:
    return run.arrival.process != "recorded" or bool(run.trace.mix)


def unread_seeds(run: Run[object]) -> dict[str, str]:
    """The seeds that `params.seeds` stands in for, and itself where nothing is drawn."""
    keys = {key: "params.seeds=[...] are the seeds of trace and arrivals" for key in ("trace.seed", "arrival.seed")}
    return keys if _draws(run) else {**keys, "params.seeds": "arrivals are recorded, so that no seed draws anything"}


def seeded(run: Run[P], seed: int) -> Run[P]:
    """The run under one seed: of what a trace draws, and of its arrivals."""
    return replace(run, trace=replace(run.trace, seed=seed), arrival=replace(run.arrival, seed=seed))


def first_seed_alone(frames: Frames, first_seed: int) -> Frames:
    """The averages of every seed; requests and memory over time of the first, which would be too large otherwise."""
    return {n: t if n == "averages" else t[t.seed == first_seed].reset_index(drop=True) for n, t in frames.items()}


def seed_rows(by_seed: pd.Series, ours: Names, published: Names, *, quantity: str, unit: str) -> Iterator[SummaryRow]:
    """The median over seeds, under our own name; beside it seed 0 alone, where that has earned a published one.

    The published points are one replay each, with the artifact's seed, which is 0.
    """
    samples = by_seed.dropna()
    if len(samples):
        yield row(median_interval(samples), quantity=quantity, unit=unit, **ours)
        if is_earned(published) and 0 in samples.index:
            yield row(float(samples[0]), quantity=quantity, unit=unit, **published)

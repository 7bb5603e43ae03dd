"""Replays over seeds: paired, since every system serves the same requests at the same times under one seed."""

from collections.abc import Sequence
from dataclasses import replace

from kvarena.errors import UserError
from kvarena.harness.run import Run


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds. Raises UserError for none, one twice, or one below 0."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"params.seeds={list(seeds)}: at least one seed, each 0 or more, and none twice")
    return list(seeds)


def seeded(run: Run, seed: int) -> Run:
    """The run under one seed: of what a trace draws, and of its arrivals."""
    return replace(run, trace=replace(run.trace, seed=seed), arrival=replace(run.arrival, seed=seed))

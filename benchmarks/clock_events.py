"""How far the modelled clock jumps: its events (rows of the step log) per decode step, on PagedAttention's Figs 12a-c.

Beside it the least that any jumping clock needs with these decisions (`forced`). Systems, rates and durations are those
of conf/experiment/serving_latency.yaml; lengths come from the embedded table, or, with `--lengths`, from the artifact's
file. Counts, so the same on every machine.
"""

import argparse
from typing import NamedTuple

import pandas as pd

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, Served, workload_of
from kvarena.harness.config import load

TARGET = 0.25
PANELS = ("fig12a", "fig12b", "fig12c")
SYSTEMS = ("fastertransformer", "orca-max", "orca-pow2", "orca-oracle", "paged")


class Count(NamedTuple):
    """Over all rates of a curve, or over several curves."""

    events: int = 0
    forced: int = 0
    steps: int = 0  # that decode

    def plus(self, other: "Count") -> "Count":
        """The sum of both."""
        return Count(self.events + other.events, self.forced + other.forced, self.steps + other.steps)

    def __str__(self) -> str:
        return (
            f"{self.events:8,} events {self.steps:10,} steps  {self.events / self.steps:.3f}"
            f"  (forced {self.forced / self.steps:.3f})"
        )


def count(panel: str, system: str, lengths: str | None) -> Count:
    """One curve, all its rates together."""
    figure = load("experiment", "serving_latency").profiles.modelled.params.panels[panel]
    seconds = figure.get(f"{system}_duration_s", figure.duration_s)
    own = ["allocator=fastertransformer", f"allocator.batch_size={figure.batch_size}"]
    overrides = [
        "experiment=memory_waste", "clock=modelled", f"model={figure.model}", f"model.tp={figure.get('tp', 1)}",
        f"device={figure.device}", f"trace={figure.trace}", f"systems=[{system}]", "arrival=artifact",
        f"arrival.duration_s={seconds}",
        *([f"trace.path={lengths}"] if lengths else []),
        *(own if system == "fastertransformer" else []),
    ]  # fmt: skip
    total = Count()
    for rate in figure.rates.get(system) or figure.rates.others:
        run = compose_run(*overrides, f"arrival.rate={rate}")
        served = Replayer(run).serve(run.systems[0], workload_of(run))
        rows = served.steps
        total = total.plus(Count(len(rows), forced(served), int(rows.steps[rows.decodes > 0].sum())))
    return total


def forced(served: Served) -> int:
    """Rows that no clock can join with the next: the batch changes between them.

    Where a prompt is fed, where somebody is preempted or comes back, and where somebody finishes.
    """
    rows = served.steps
    changes = (rows.prefills > 0) | (rows.preempted > 0) | (rows.swapped_out > 0) | (rows.swapped_in > 0)
    finishes = (rows.start_ps + rows.duration_ps).isin(pd.Index(served.requests.finish_ps.dropna()))
    return int((changes | changes.shift(-1, fill_value=True) | finishes).sum())


def main() -> None:
    """Print each curve, each panel and all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", help="the artifact's length file")
    lengths = parser.parse_args().lengths
    total = Count()
    for panel in PANELS:
        together = Count()
        for system in SYSTEMS:
            curve = count(panel, system, lengths)
            print(f"{panel} {system:18s} {curve}")
            together = together.plus(curve)
        print(f"{panel} {'all systems':18s} {together}")
        total = total.plus(together)
    ratio = total.events / total.steps
    print(f"Figs 12a-c: {ratio:.3f} events per decode step (target at most {TARGET}; ratio {ratio / TARGET:.2f})")


if __name__ == "__main__":
    main()

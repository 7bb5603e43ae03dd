"""How far the modelled clock jumps: its events (rows of the step log) per decode step, on PagedAttention's Figs 12a-c.

Systems, rates and durations are those of conf/experiment/serving_latency.yaml; lengths come from the embedded table,
or, with `--lengths`, from the artifact's file. Counts, so the same on every machine.
"""

import argparse
from collections import Counter

from kvarena.experiments.compose import compose_run
from kvarena.experiments.replay import Replayer, workload_of
from kvarena.harness.config import load

TARGET = 0.25
PANELS = ("fig12a", "fig12b", "fig12c")
SYSTEMS = ("fastertransformer", "orca-max", "orca-pow2", "orca-oracle", "paged")


def count(panel: str, system: str, lengths: str | None) -> tuple[int, int]:
    """Events and decode steps of one curve, all its rates together."""
    figure = load("experiment", "serving_latency").profiles.modelled.params.panels[panel]
    seconds = figure.get(f"{system}_duration_s", figure.duration_s)
    own = ["allocator=fastertransformer", f"allocator.batch_size={figure.batch_size}"]
    overrides = [
        "experiment=memory_waste", "clock=modelled", f"model={figure.model}", f"device={figure.device}",
        "arrival=artifact", f"arrival.duration_s={seconds}", f"trace={figure.trace}", f"systems=[{system}]",
        *([f"trace.path={lengths}"] if lengths else []),
        *(own if system == "fastertransformer" else []),
    ]  # fmt: skip
    events = steps = 0
    for rate in figure.rates.get(system) or figure.rates.others:
        run = compose_run(*overrides, f"arrival.rate={rate}")
        rows = Replayer(run).serve(run.systems[0], workload_of(run)).steps
        events += len(rows)
        steps += int(rows.steps[rows.decodes > 0].sum())
    return events, steps


def main() -> None:
    """Print the ratio of each curve, of each panel and of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", help="the artifact's length file")
    lengths = parser.parse_args().lengths
    totals: Counter[str] = Counter()
    for panel in PANELS:
        for system in SYSTEMS:
            events, steps = count(panel, system, lengths)
            print(f"{panel} {system:18s} {events:8,} events {steps:10,} steps  {events / steps:.3f}")
            totals.update({f"{panel} events": events, f"{panel} steps": steps, "events": events, "steps": steps})
        print(f"{panel} {'all systems':18s} {totals[f'{panel} events'] / totals[f'{panel} steps']:.3f}")
    ratio = totals["events"] / totals["steps"]
    print(f"Figs 12a-c: {ratio:.3f} events per decode step (target at most {TARGET}; ratio {ratio / TARGET:.2f})")


if __name__ == "__main__":
    main()

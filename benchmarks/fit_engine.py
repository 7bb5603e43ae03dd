"""The three constants of an engine of 2023 (per step, per sequence, per token), fitted to curves of Fig 12.

    ./run.sh benchmark fit_engine --systems orca-max orca-pow2 orca-oracle --lengths <the artifact's ShareGPT lengths>

Fitting some systems' curves and predicting the others' is the test out of sample that a fit to all cannot give. A
coarse grid, then a simplex from each of its best points: near the knee the error is no smooth function of the
constants, and a longer step trades for a shorter sequence. Deterministic, a quarter of an hour on one core. What is
arithmetic (reading weights and K/V) stays as conf/engine/vllm2023.yaml has it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import optimize

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.latency_error import log_errors, rms
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.pagedattention.serving_latency import normalized_latency_s
from kvarena.experiments.pagedattention.serving_panels import run_of_panel
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.run.run import Run

GRID = {"base_ms": (8, 10, 12, 14, 16), "sequence_ms": (0.2, 0.3, 0.4, 0.5), "token_ms": (0.08, 0.12, 0.16)}
NAMES = tuple(GRID)
STARTS, EVALUATIONS = 3, 60  # simplexes, and evaluations of each
Constants = tuple[float, ...]


def error_of(run: Run[object], figure: str) -> Callable[[Constants], float]:
    """A function that gives the RMS log error, in percent, of all points of the run's systems."""
    panel, stated = run.params.panels[figure], run.published[figure]
    run = run_of_panel(run, panel)
    (title,) = stated.panels
    published = {file: key for key, file in stated.systems.items()}
    points = [(s, rate) for s in run.systems for rate in panel.rates[s.name]]
    workloads = {rate: workload_of(run, rate=rate, duration_s=panel.duration_s) for _, rate in points}
    known: dict[Constants, float] = {}

    def error(constants: Constants) -> float:
        if constants not in known:
            replayer = Replayer(replace(run, engine=engine_with(run, constants)))
            rows = [(title, published[s.name], rate, normalized_latency_s(replayer.serve(s, workloads[rate]).requests))
                    for s, rate in points]  # fmt: skip
            known[constants] = rms(log_errors(pd.DataFrame(rows, columns=["panel", "system", "x", "value"]), figure))
        return known[constants]

    return error


def engine_with(run: Run[object], constants: Constants) -> EngineConfig:
    """The run's engine with these constants for its model."""
    engine: EngineConfig = run.engine
    fitted = replace(engine.fitted[run.model.name], **dict(zip(NAMES, constants, strict=True)))
    return replace(engine, fitted={**engine.fitted, run.model.name: fitted})


def search(error: Callable[[Constants], float]) -> Constants:
    """The best end of the simplexes, rounded to three digits."""
    starts = sorted(itertools.product(*GRID.values()), key=error)[:STARTS]
    print("grid:", *(f"{start} {error(start):.2f} %" for start in starts), sep="\n  ", flush=True)
    found = [_descend(error, start) for start in starts]
    print("simplexes:", *(f"{end} {error(end):.2f} %" for end in found), sep="\n  ", flush=True)
    return min(found, key=error)


def _descend(error: Callable[[Constants], float], start: Constants) -> Constants:
    """Nelder and Mead's simplex over logarithms, so that all constants stay above 0."""
    corners = np.log(start) + 0.12 * np.vstack([np.zeros(3), np.eye(3)])
    options = {"initial_simplex": corners, "maxfev": EVALUATIONS, "xatol": 0.002, "fatol": 0.01}
    result = optimize.minimize(lambda x: error(rounded(np.exp(x))), corners[0], method="Nelder-Mead", options=options)
    return rounded(np.exp(result.x))


def rounded(constants: Iterable[float]) -> Constants:
    """Three digits, as the constants are written down."""
    return tuple(float(f"{c:.3g}") for c in constants)


def main() -> None:
    """Print the constants and their error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="fig12a")
    parser.add_argument("--systems", nargs="+", default=["orca-max", "orca-pow2", "orca-oracle", "paged"])
    parser.add_argument("--lengths", help="the artifact's length file; the embedded table without it")
    given = parser.parse_args()
    overrides = ["experiment=serving_latency", "clock=modelled", f"systems=[{','.join(given.systems)}]"]
    run = compose_run(*overrides, *([f"params.paths.sharegpt={given.lengths}"] if given.lengths else []))
    error = error_of(run, given.figure)
    best = search(error)
    told = ", ".join(f"{name}: {value:g}" for name, value in zip(NAMES, best, strict=True))
    print(f"{given.figure} {' '.join(given.systems)}: {told}; RMS log error {error(best):.2f} %")


if __name__ == "__main__":
    main()

"""A child process that times the suite beside it on whichever `kvarena` its PYTHONPATH names.

Started as a script, so that it is always the head's text. It says what there is, then answers one line for each:

    -> {"benchmarks": [...], "own": [...]}     of the suite beside it; of the tree's own suite
    <- paged policy, block by block
    -> {"seconds": 0.0031}  or  {"error": "ImportError: ..."}
"""

import importlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = 10  # per sample, which is the fastest of them: what disturbs a run only ever makes it longer


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    suite = runpy.run_path(str(Path(__file__).with_name(sys.argv[1])))["BENCHMARKS"]
    bodies: dict[str, Callable[[], object]] = {}
    _answer(answers, {"benchmarks": list(suite), "own": _own(sys.argv[1])})
    for line in sys.stdin:
        _answer(answers, _sample(suite, bodies, line.rstrip("\n")))


def _own(file: str) -> list[str]:
    """Names of the suite that the tree itself has; none where it has no gate yet."""
    try:
        return list(importlib.import_module(f"kvarena.harness.regression.{Path(file).stem}").BENCHMARKS)
    except ImportError:
        return []


def _sample(suite: dict[str, Any], bodies: dict[str, Callable[[], object]], name: str) -> dict[str, object]:
    """Seconds of the fastest of some runs; the first call of all makes the state, and is not timed."""
    try:
        if name not in bodies:
            bodies[name] = suite[name]()
            bodies[name]()
        return {"seconds": min(_seconds(bodies[name]) for _ in range(RUNS))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _seconds(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def _answer(answers: Any, answer: dict[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

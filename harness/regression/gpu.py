"""Tier 3: GPU times against a committed baseline of the same GPU, driver and torch.

A CI job has the GPU for itself but not the base's numbers of today, so the noise is measured beside: the suite runs in
two processes of the same code, in turns (A/A). A median may exceed the baseline by 5 %, or by three times what the two
differ by, whichever is more.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from kvarena.errors import UserError
from kvarena.harness.record.provenance import libraries, machine
from kvarena.harness.regression import baseline
from kvarena.harness.regression.side import HEAD, Side, WorkerDied
from kvarena.harness.regression.verdict import Finding, Outcome, Value, Verdict

TIER = "Tier 3, GPU times"
SUITE = "gpu_suite.py"
ROUNDS = 7  # samples of each process
MIN_SAMPLES = 5
MIN_THRESHOLD = 0.05
NOISE_FACTOR = 3

Machine = Mapping[str, str]  # gpu, driver, torch


class Series(NamedTuple):
    """Seconds of one benchmark, of both processes; or what went wrong."""

    a: list[float]
    b: list[float]
    error: str = ""


def this_machine() -> Machine | None:
    """What must be the same for two times to be compared; None without a GPU."""
    found = machine()
    if "gpu" not in found:
        return None
    return {"gpu": found["gpu"], "driver": str(found["gpu_driver"]), "torch": libraries()["torch"]}


def baseline_name(here: Machine) -> str:
    """File of a GPU's baseline."""
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', here['gpu'].lower()).strip('-')}.json"


def run() -> Outcome:
    """Measure and judge, where there is a GPU and a baseline of it."""
    here = this_machine()
    if here is None:
        return Outcome(TIER, not_judged="No GPU: torch sees none here.")
    name = baseline_name(here)
    try:
        committed = json.loads(baseline.read(name))
    except baseline.BaselineError as error:
        return Outcome(TIER, not_judged=f"{error}. `--tier 3 --accept REASON` writes one on this machine.")
    if reason := refusal(committed["machine"], here):
        return Outcome(TIER, not_judged=reason)
    outcome = judge(committed["median_s"], measure(HEAD))
    outcome.against = f"results/baselines/{name}; {here['gpu']}, driver {here['driver']}, torch {here['torch']}"
    return outcome


def accept(reason: str) -> list[str]:
    """Make this tree's times the baseline of this GPU. Returns how they differ from the last one.

    Raises UserError without a GPU, or where a time is no number.
    """
    here = this_machine()
    if here is None:
        raise UserError("--tier 3 --accept: torch sees no GPU here")
    name, series = baseline_name(here), measure(HEAD)
    old = json.loads(path.read_text()) if (path := baseline.BASELINES / name).is_file() else {"median_s": {}}
    outcome = judge(old["median_s"], series)
    if bad := [benchmark for benchmark, taken in series.items() if not _usable(taken)]:
        raise UserError(f"no usable times of {', '.join(bad)}. Nothing was accepted")
    medians = {benchmark: median([*taken.a, *taken.b]) for benchmark, taken in series.items()}
    text = json.dumps({"machine": here, "median_s": medians}, indent=2) + "\n"
    changes = [f"{f.figure}: {f.base or 'absent'} -> {f.head or 'absent'}" for f in outcome.findings]
    baseline.accept(name, text, reason, changes)
    return changes


def measure(tree: Path, rounds: int = ROUNDS) -> dict[str, Series]:
    """The suite in two processes of one tree, in turns."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(Side(tree, SUITE)) for _ in range(2))
        return {name: _series(name, a, b, rounds) for name in a.benchmarks}


def _series(name: str, a: Side, b: Side, rounds: int) -> Series:
    taken: tuple[list[float], list[float]] = ([], [])
    try:
        for turn in range(rounds + 1):  # the first is not looked at: it compiles, and warms up
            for side, samples in zip((a, b), taken, strict=True):
                answer = side.sample(name)
                if isinstance(answer, str):
                    return Series([], [], answer)
                if turn:
                    samples.append(answer)
    except WorkerDied as error:
        return Series([], [], f"the process died: {error}")
    return Series(*taken)


def refusal(committed: Machine, here: Machine) -> str:
    """Why times of this machine must not be compared with the committed ones; empty where they may."""
    differing = [
        f"{key} {committed.get(key)} there, {here[key]} here" for key in here if committed.get(key) != here[key]
    ]
    return f"Refused, the baseline is another machine's: {'; '.join(differing)}." if differing else ""


def judge(base: Mapping[str, float], head: Mapping[str, Series]) -> Outcome:
    """One finding per benchmark of either."""
    outcome = Outcome(TIER)
    for name in dict.fromkeys([*base, *head]):
        outcome.findings.append(_compare(name, base.get(name), head.get(name)))
        if name in head and _usable(head[name]):
            outcome.values.append(Value(name, "us", 1e6 * median([*head[name].a, *head[name].b])))
    return outcome


def _compare(name: str, base: float | None, head: Series | None) -> Finding:
    if head is None:
        return Finding(name, _us(base), "", Verdict.UNJUDGEABLE, note="vanished: the head does not measure it")
    if not _usable(head):
        few = f"fewer than {MIN_SAMPLES} samples, or not a number"
        return Finding(name, _us(base), "", Verdict.UNJUDGEABLE, note=head.error or few)
    now = median([*head.a, *head.b])
    if base is None:
        return Finding(name, "", _us(now), Verdict.NEW, note="not in the baseline")
    if not (math.isfinite(base) and base > 0):
        return Finding(name, str(base), _us(now), Verdict.UNJUDGEABLE, note="the baseline is not a number above 0")
    noise = abs(median(head.a) / median(head.b) - 1)
    threshold = max(MIN_THRESHOLD, NOISE_FACTOR * noise)
    verdict = Verdict.REGRESSED if now / base > 1 + threshold else Verdict.OK
    note = f"may be {100 * threshold:.1f} % slower, A/A noise {100 * noise:.1f} %"
    return Finding(name, _us(base), _us(now), verdict, f"{now / base:.2f}x", note)


def _usable(series: Series) -> bool:
    samples = [*series.a, *series.b]
    enough = min(len(series.a), len(series.b)) >= MIN_SAMPLES
    return enough and all(math.isfinite(sample) and sample > 0 for sample in samples)


def _us(seconds: float | None) -> str:
    return "" if seconds is None or not math.isfinite(seconds) else f"{1e6 * seconds:.1f} us"

"""What runs in which session, in which order, and how long that is assumed to take.

A GPU is at hand rarely, and then for a quarter of an hour in all. So there are two plans of 300 s each: the first
answers what everything else rests on, the second the rest, once the first has been read and mended. What
`BEYOND` adds belongs to neither; it runs where there is time (no --plan).

Assumed seconds are those of one case on an H200, everything in it included. No GPU has confirmed any of them yet.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from kvarena.experiments.gpu_validation.step import STEPS, Step, step_named

COMPILE = "Triton compiles a kernel in 0.3-1.4 s (two cores), a case takes some of them"
READ = "reads at 4 TB/s"


class Row(NamedTuple):
    """Cases of one step that run in one process."""

    step: Step
    patterns: tuple[str, ...]  # of names of cases
    case_s: float  # assumed, of each
    source: str  # of that number
    last: bool = False  # it is meant to fault: whatever comes after a fault may suffer from it

    def cases(self, device: str) -> list[str]:
        """Names of the cases in order. A rehearsal has others: all those of the step."""
        names = self.step.cases(device)
        return [name for name in names if device == "cpu" or any(fnmatchcase(name, each) for each in self.patterns)]

    @property
    def seconds(self) -> float:
        """Assumed, of all cases."""
        return self.case_s * len(self.cases("cuda"))

    @property
    def case_limit_s(self) -> float:
        """A case that takes longer is killed."""
        return 150.0 if self.step is STEPS[0] else 3 * self.case_s + 15

    @property
    def limit_s(self) -> float:
        """Of all cases together: one that hangs must not cost the session."""
        return 150.0 if self.step is STEPS[0] else 2 * self.seconds + 30


def _row(step: str, case_s: float, source: str, *patterns: str, last: bool = False) -> Row:
    return Row(step_named(step), patterns or ("*",), case_s, source, last)


ENVIRONMENT = _row("environment", 25, "first import of everything, from a cold disk: 5-40 s; the context 2 s")
ONE = (
    _row("driver-contract", 25, "pytest's start and 120 tests of milliseconds; each makes a driver"),
    _row("addresses", 1, "milliseconds each, and a compilation"),
    _row("edge", 3, COMPILE, "triton, one page-group more", "fa3, one page-group more"),
    _row("kernels", 5, f"float64 on the CPU, 1 s; {COMPILE}", "triton, *", "fa3, *", "torch_flash, rows"),
    _row("bandwidth", 2, f"8 GiB, 11 times, {READ}"),
    _row("sweep", 15, f"drawing 1 GiB and float64, 4 s; {COMPILE}", "batch 32, context 16384"),
    _row("decode", 18, "weights 2 s, 60 GB of pools 3 s, graphs 3 s, 210 steps of 8 ms", "*, CUDA graphs, batch 16"),
    _row("replay", 12, "three replays of 24 requests, some 150 steps of 20 ms each"),
    _row("overlap", 30, "weights 3 s, 2 rounds of 3 x 150 steps of 12 ms, and their pools"),
    _row("copies", 4, "512 copies, 20 times either way; a compilation"),
    _row("tiles", 3, f"{COMPILE}, for each of 8 shapes"),
)
TWO = (
    _row("graphs", 9, "a replay of which every step runs twice", "static", "paged", "vattention"),
    _row("decode", 12, "weights 2 s, pools 1 s, graphs 3 s, 210 steps of 4 ms", "*, CUDA graphs, batch 1"),
    _row(
        "sweep", 3, "as the goal's point, everything compiled", "batch 1, *", "batch 4, *", "batch 16, *", "batch 64, *"
    ),
    _row("latencies", 18, "10 rounds of 10,000 mappings of 3 us; drivers in one context"),
    _row("prefill", 25, "18 prompts of up to 16K tokens at 20K tokens/s, three systems", "fa3"),
    _row("decode", 20, "as with graphs; steps of 20 ms", "*, eager*"),
    _row("edge", 5, "a fault, and the end of its process", "fa3, mapped to its length", last=True),
)
BEYOND = (  # all that the plans leave out
    _row("edge", 3, COMPILE),
    _row("kernels", 5, COMPILE),
    _row("prefill", 25, "as with fa3"),
    _row("graphs", 40, "20 tests"),
    _row("models", 8, "up to 69 GB of weights, drawn on the device"),
)
PLANS = {1: (ENVIRONMENT, *ONE), 2: (ENVIRONMENT, *TWO)}
ALL = (ENVIRONMENT, *ONE, *TWO, *BEYOND)
RESERVE_S = 40.0  # of plan 2, for what failed in plan 1

Planned = tuple[Row, list[str]]  # a row, and its cases


def each_once(rows: Iterable[Row], device: str) -> list[Planned]:
    """Cases by row, a case in the first row that has it; what is meant to fault last."""
    taken: set[tuple[str, str]] = set()
    planned = []
    for row in rows:
        cases = [case for case in row.cases(device) if (row.step.name, case) not in taken]
        taken |= {(row.step.name, case) for case in cases}
        planned.append((row, cases))
    return sorted(planned, key=lambda each: each[0].last)

"""What the device's memory gives, and its arithmetic: the limits that kernels are held against."""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.measured.timed_call import seconds

BYTES = {"cuda": 8 << 30, "cpu": 64 << 20}
SQUARE = {"cuda": 8192, "cpu": 512}
ROUNDS = 10


def cases(device: str) -> list[str]:
    """Names of the limits."""
    return list(_LIMITS)


def run(case: str, context: Context) -> Values:
    """Median of some rounds, after one that is not looked at."""
    rate, unit = _LIMITS[case](context.device)
    rate()
    taken = [rate() for _ in range(ROUNDS)]
    return {unit: round(median(taken), 1), f"{unit}, best": round(max(taken), 1)}


Limit = tuple[Callable[[], float], str]  # what measures it once, and its unit


def _reduction(device: str) -> Limit:
    read = StreamingRead(torch.device(device), BYTES[device])
    return partial(read.gb_per_s, repetitions=1), "GB/s"


def _copy(device: str) -> Limit:
    source = torch.ones(BYTES[device] // 8, device=device)
    target = torch.empty_like(source)
    return lambda: BYTES[device] / seconds(lambda: target.copy_(source), device) / 1e9, "GB/s read and written"


def _product(device: str) -> Limit:
    n = SQUARE[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: 2 * n**3 / seconds(lambda: a @ b, device) / 1e9, "GFLOP/s"


_LIMITS: dict[str, Callable[[str], Limit]] = {
    "read-only reduction": _reduction,
    "copy": _copy,
    "matrix product": _product,
}

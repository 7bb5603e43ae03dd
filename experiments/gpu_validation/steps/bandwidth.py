"""What the device's memory gives, and its arithmetic: the limits that kernels are held against."""

from collections.abc import Callable
from statistics import median

import torch

from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.measured.timed_call import seconds

BYTES = {"cuda": 8 << 30, "cpu": 64 << 20}
SQUARE = {"cuda": 8192, "cpu": 512}
ROUNDS = 10


def cases(device: str) -> list[str]:
    """Names of the limits."""
    return list(_LIMITS)


def run(case: str, context: Context) -> Values:
    """Median of some rounds, after one that is not looked at."""
    call, amount, unit = _LIMITS[case](context.device)
    call()
    taken = [seconds(call, context.device) for _ in range(ROUNDS)]
    return {unit: round(amount / median(taken) / 1e9, 1), f"{unit}, best": round(amount / min(taken) / 1e9, 1)}


Limit = tuple[Callable[[], object], float, str]  # call, how much it moves or computes, unit of a billion of it per s


def _reduction(device: str) -> Limit:
    values = torch.ones(BYTES[device] // 4, device=device)
    return values.sum, BYTES[device], "GB/s"


def _copy(device: str) -> Limit:
    source = torch.ones(BYTES[device] // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), BYTES[device], "GB/s read and written"


def _product(device: str) -> Limit:
    n = SQUARE[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3, "GFLOP/s"


_LIMITS: dict[str, Callable[[str], Limit]] = {
    "read-only reduction": _reduction,
    "copy": _copy,
    "matrix product": _product,
}

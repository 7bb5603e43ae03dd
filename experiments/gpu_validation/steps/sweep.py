"""GB/s of K/V that decode attention reads, by batch and context, beside a read-only reduction of as many bytes.

The same bytes serve as rows, as blocks in order and as shuffled blocks. Small batches are read many times over, each
time elsewhere, so that no cache holds what is read; kernels that can be captured run as one graph. Every kernel is
first held to the output of another one on the same bytes (`kernels` has held both to float64).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.kernels import ARRANGEMENTS, TOLERANCE, kernel_names
from kvarena.harness.measured.timed_call import captured, seconds
from kvarena.kernels.arrangement import Arrangement, arranged
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import fits, get_kernel, missing

GOAL = (32, 16384)  # batch and context that the goals are stated for
GRID = {
    "cuda": [GOAL, *itertools.product((1, 4, 16, 64), (1024, 4096, 16384, 65536))],
    "cpu": [(2, 256), (1, 512)],
}
HEADS, GROUP, SIZE, BLOCK = 8, 4, 128, 16  # Llama-3-8B's
LEAST_BYTES = {"cuda": 1 << 30, "cpu": 16 << 20}  # read before anything is read again
ROUNDS = 7
SLOW = frozenset({"sdpa", "gather_sdpa", "vllm_paged"})  # one call per sequence, or a copy of everything, each time


def cases(device: str) -> list[str]:
    """The goal's point first."""
    return [f"batch {batch}, context {context}" for batch, context in GRID[device]]


def run(case: str, context: Context) -> Values:
    """GB/s of every kernel and arrangement, and the goal's ratios."""
    batch, tokens = (int(part.split()[1]) for part in case.split(", "))
    memory = Memory(batch, tokens, context)
    runs = memory.runs()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        names = list(runs)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(seconds(runs[name], context.device))
    rates = {name: memory.num_bytes / median(times) / 1e9 for name, times in taken.items()}
    shares = {f"{name} / read": rate / rates["read"] for name, rate in rates.items() if name != "read"}
    ours = {"triton rows / fa3 rows": rates["triton rows"] / rates["fa3 rows"]} if "fa3 rows" in rates else {}
    return {
        **{name: round(ratio, 3) for name, ratio in {**ours, **shares}.items()},
        **{f"{name}, GB/s": round(rate, 1) for name, rate in rates.items()},
    }


@dataclass
class Memory:
    """K/V of as many batches of equal sequences as fill LEAST_BYTES, and what reads them all once."""

    batch: int
    tokens: int
    context: Context

    def __post_init__(self) -> None:
        """Draw the bytes on the device."""
        self.dtype = torch.bfloat16 if self.context.on_gpu else torch.float32
        token_bytes = 2 * HEADS * SIZE * self.dtype.itemsize
        self.copies = max(1, LEAST_BYTES[self.context.device] // (self.batch * self.tokens * token_bytes))
        self.num_bytes = self.copies * self.batch * self.tokens * token_bytes
        rows = self.copies * self.batch
        shape = (rows, self.tokens, HEADS, SIZE)
        self.k, self.v = (torch.randn(shape, dtype=self.dtype, device=self.context.device) for _ in range(2))
        self.q = torch.randn(self.batch, HEADS * GROUP, SIZE, dtype=self.dtype, device=self.context.device)

    def runs(self) -> dict[str, Callable[[], object]]:
        """The reduction, and every kernel on every arrangement: none may differ from the first that read the same."""
        found: dict[str, Callable[[], object]] = {"read": self._reduction}
        first: dict[str, Tensor] = {}  # by arrangement: shuffled blocks make other sequences of the same bytes
        for name, arrangement in itertools.product(kernel_names(self.context.device), ARRANGEMENTS):
            if (where := self._readable(name, arrangement)) is None:
                continue
            kernel, out = get_kernel(name), torch.empty_like(self.q)
            random = torch.Generator().manual_seed(0)  # shuffled blocks are shuffled alike for every kernel
            cache, views = arranged(self.k, self.v, where, self.batch, self.tokens, random)
            calls = [partial(kernel.decode, self.q, cache, view, out) for view in views]
            calls[0]()
            reference = first.setdefault(arrangement.removesuffix(" in order").replace("blocks", "rows"), out.clone())
            gap = float((out - reference).abs().max() / reference.abs().max())
            if not gap <= 2 * TOLERANCE[self.dtype]:
                raise FailedError(f"{name} on {arrangement} is off by {gap:.1e} of the largest output of the first")
            found[f"{name} {arrangement}"] = self._all(kernel, calls)
        return found

    def _reduction(self) -> list[Tensor]:
        return [x.view(torch.int64).sum() for x in (self.k, self.v)]

    def _readable(self, name: str, arrangement: str) -> Arrangement | None:
        """Where tokens lie then; None where the kernel is absent, too slow or cannot read it."""
        spec, scattered = CATALOGUE[name][0], ARRANGEMENTS[arrangement]
        block = BLOCK if spec.block_sizes is None or BLOCK in spec.block_sizes else min(spec.block_sizes)
        dtype = str(self.dtype).removeprefix("torch.")
        where = Arrangement(None) if scattered is None else Arrangement(block, scattered)
        if name in SLOW or missing(spec) or fits(spec, where.layout, self.context.device, dtype, SIZE, block):
            return None
        if not spec.in_graph and self.copies > 1 and self.context.on_gpu:
            return None  # what it does on the host for every batch would be timed
        return where

    def _all(self, kernel: AttentionKernel, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def run_all() -> None:
            for call in calls:
                call()

        run_all()
        return captured(run_all) if self.context.on_gpu and kernel.spec.in_graph else run_all

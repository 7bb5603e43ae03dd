"""How long one call of a decode kernel takes, cold: over more K/V than any cache holds, as layer after layer does.

The same bytes serve as rows and as blocks, in order or scattered (`kernels/arrangement.py`).
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.harness.measured.timed_call import captured, seconds
from kvarena.harness.model.config import ModelConfig
from kvarena.kernels.arrangement import Arrangement, arranged
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.view import BatchView, LayerCache

# Kernels sum in different orders: their outputs differ from float64's by this part of the largest, at most.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

CHECKED_TOKENS = 1 << 16  # of sequences that are held to it: float64 on the CPU takes a second for so many
USUAL_BLOCK = 16  # tokens: vLLM's, and the one that others are compared with

Call = Callable[[], None]
Line = TypeVar("Line")
Timer = Callable[[], float]  # takes a measurement: seconds


def timers_of(
    lines: Iterable[Line], timer: Callable[[Line], Timer], refused: Callable[[Line, Exception], None]
) -> dict[Line, Timer]:
    """What measures each line; one whose kernel does not take what it is handed costs itself alone.

    `refused` hears of it, and may raise. Raises UserError where no line is left.
    """
    timers, why = {}, ""
    for line in lines:
        try:
            timers[line] = timer(line)
        except Exception as error:
            refused(line, error)
            why = str(error)
    if not timers:
        raise UserError(f"no kernel is left to be measured; the last one said: {why}")
    return timers


def left_out(asked: Sequence[str] | None) -> Callable[[object, Exception], None]:
    """Say which line is left out, and why; raise where its kernel was asked for by name, or is wrong."""

    def refused(line: object, error: Exception) -> None:
        if asked is not None or not isinstance(error, UserError):
            raise error
        print(f"left out: {line}: {error}", file=sys.stderr)

    return refused


class WorkingSet:
    """K/V of one layer for as many batches of equal sequences as fill `num_bytes`."""

    def __init__(self, model: ModelConfig, batch: int, context: int, num_bytes: int, device: torch.device) -> None:
        """Rows are as long as the next power of two, so that every block size divides them."""
        self._model, self._batch, self._context = model, batch, context
        dtype = getattr(torch, model.dtype)
        stride = max(USUAL_BLOCK, 1 << (context - 1).bit_length())  # tokens of a row
        batch_bytes = 2 * batch * stride * model.num_kv_heads * model.head_size * dtype.itemsize
        self.num_batches = max(1, -(-num_bytes // batch_bytes))
        self.bytes_per_call = batch_bytes * context // stride  # of K/V that is read
        drawn = torch.Generator(device).manual_seed(model.seed)  # where they are wanted: a CPU takes a minute for 2**33
        shape = (self.num_batches * batch, stride, model.num_kv_heads, model.head_size)
        one = torch.randn(2, 1 + batch, *shape[1:], generator=drawn, device=device, dtype=dtype)
        source = torch.arange(shape[0], device=device) % (1 + batch)  # copies: drawing them all would take seconds
        self._k, self._v = one[0][source], one[1][source]
        self._q = torch.randn(batch, model.num_heads, model.head_size, generator=drawn, device=device, dtype=dtype)
        self._tables = torch.Generator().manual_seed(model.seed)
        self._arranged: dict[Arrangement, tuple[LayerCache, list[BatchView], Tensor]] = {}

    def calls(self, kernel: AttentionKernel, arrangement: Arrangement) -> list[Call]:
        """One call for each batch of the set, checked against float64 on the first. Raises RuntimeError.

        Every kernel finds the same tables.
        """
        if arrangement not in self._arranged:
            self._arranged[arrangement] = self._arrange(arrangement)
        cache, views, expected = self._arranged[arrangement]
        out = torch.empty_like(self._q)
        kernel.decode(self._q, cache, views[0], out)
        gap = float((out[: len(expected)].double().cpu() - expected).abs().max() / expected.abs().max())
        if not gap <= TOLERANCE[self._model.dtype]:
            raise RuntimeError(f"{kernel.spec.name} on {arrangement}: off by {gap:.2e} of the largest output")
        return [lambda view=view: kernel.decode(self._q, cache, view, out) for view in views]  # type: ignore[misc]

    def _arrange(self, arrangement: Arrangement) -> tuple[LayerCache, list[BatchView], Tensor]:
        """The bytes so arranged, a view of each batch, and what the first sequences of the first must give."""
        cache, views = arranged(self._k, self._v, arrangement, self._batch, self._context, self._tables)
        checked = _first(views[0], max(1, CHECKED_TOKENS // self._context))
        return cache, views, reference_attention(self._q[: checked.batch_size], cache, checked)


def _first(view: BatchView, count: int) -> BatchView:
    """The first sequences of a batch that decodes."""
    rows, table = (None if each is None else each[:count] for each in (view.rows, view.block_table))
    return replace(view, lengths=view.lengths[:count], query_starts=view.query_starts[: count + 1], rows=rows,
                   block_table=table)  # fmt: skip


def seconds_per_call(calls: Sequence[Call], device: torch.device, in_graph: bool) -> Timer:
    """A measurement of the mean over all calls, one after the other.

    On a GPU it is the device's time; where the kernel allows it the calls are replayed as one graph, since launching
    them one by one takes longer than the kernels that are measured here.
    """

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    run = captured(all_calls) if in_graph and device.type == "cuda" else all_calls
    return lambda: seconds(run, device) / len(calls)

"""The store of vAttention: virtual tensors, backed page-group by page-group as the policy says.

    plain     2N tensors [B, L, H, D], K and V of each of N layers (section 5.1 of the paper)
    sliced    K and V [B, L, N, H, D] over all layers; a layer is a strided slice of it (section 8.2)

B rows of up to L tokens; a row begins at a page-group. Every page-group of the pool is created at the start, one
handle for each tensor and number: number n of tensor t is handle t * page_groups_per_tensor + n, so that ascending
numbers of a row are one run of memory, one call and one mapping.

Actions for the background run in one worker thread beside the forward pass. Maps go to the driver in one batch, which
is one call without the interpreter's lock, and the thread keeps off the core of the one it works for: what
shares either with the forward pass hides nothing. Whoever needs the mappings next waits for the thread, and hears there
if it failed.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from time import perf_counter_ns
from typing import Any, Protocol

import torch
from torch import Tensor

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.allocators.memory.device_view import view_maker
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.store import DriverCalls, Physical, Store
from kvarena.allocators.policy import Action, CopyRow, Map, Policy, Unmap
from kvarena.allocators.vattention.cores import move_to, other_cores
from kvarena.allocators.vattention.kernel_fence import kernels_so_far
from kvarena.allocators.vmm.driver import CallTotals, Driver, MapRun
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class MappingPolicy(Protocol):
    """A policy that maps rows page-group by page-group, as this store sees it."""

    page_groups_per_tensor: int
    max_rows: int
    max_tokens: int  # of a row
    tensor_slicing: bool  # one K and one V tensor over all layers

    def row(self, seq_id: int) -> int:
        """Index of a sequence's row."""
        ...


class VirtualStore(Store):
    """Rows of virtual tensors."""

    def __init__(
        self,
        policy: Policy,
        shape: ModelShape,
        driver: Driver | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UserError where the pool does not fit the machine, or the policy's layout not the model."""
        if not policy.geometries:
            raise TypeError(f"VirtualStore serves policies that map rows, not {type(policy).__name__}")
        shape.check(policy.kv_layout)
        rows: MappingPolicy = policy  # type: ignore[assignment]  # a policy that maps rows
        self._policy = rows
        [geometry] = policy.geometries
        self._page_group = geometry.page_group
        self._num_tensors = geometry.num_tensors
        self._row_bytes = geometry.row_bytes(rows.max_tokens)
        self.driver = driver if driver is not None else make_driver(device, self._page_group)
        self._make_view = view_maker(torch.device(self.driver.device))
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvarena-map")
        self._pending: Future[None] | None = None
        self._background = CallTotals()
        self._waited_ns = 0
        try:
            self._bases = [self.driver.reserve(rows.max_rows * self._row_bytes) for _ in range(self._num_tensors)]
            self._handles = self.driver.create(self._num_tensors * rows.page_groups_per_tensor)
            if not self.driver.new_memory_is_zero:  # kernels weigh what lies past a length with 0: no NaN may be there
                self.driver.clear(self._handles)
            self.tensors = self._make_tensors(shape)
            self._layers = self._make_layers(shape.num_layers)
            self._copy = ByteCopies(self._bases, self.tensors[0].device)
            self.driver.prepare()
        except BaseException:
            self.close()
            raise
        self._at_start = self.driver.totals()

    def _make_tensors(self, shape: ModelShape) -> list[Tensor]:
        """K of every layer, then V of every layer; or both over all layers."""
        rows, tokens, heads = self._policy.max_rows, self._policy.max_tokens, (shape.num_kv_heads, shape.head_size)
        if self._policy.tensor_slicing:
            dims: tuple[int, ...] = (rows, tokens, shape.num_layers, *heads)
            strides: tuple[int, ...] = (self._row_bytes, shape.num_layers * shape.token_bytes, shape.token_bytes)
        else:
            dims, strides = (rows, tokens, *heads), (self._row_bytes, shape.token_bytes)
        strides = (*strides, *shape.head_strides)
        return [strided_tensor(self.driver, base, shape.dtype, dims, strides) for base in self._bases]

    def _make_layers(self, num_layers: int) -> list[LayerCache]:
        k_and_v = len(self.tensors) // 2
        ks, vs = self.tensors[:k_and_v], self.tensors[k_and_v:]
        if self._policy.tensor_slicing:
            ks, vs = ([tensor[:, :, n] for n in range(num_layers)] for [tensor] in (ks, vs))
        return [LayerCache(Layout.CONTIGUOUS, k, v) for k, v in zip(ks, vs, strict=True)]

    def layer(self, layer: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[layer]

    def apply(self, actions: Sequence[Action]) -> None:
        """Map and unmap now."""
        self._wait()
        if actions:
            self._perform(actions, kernels_so_far(self.driver.device))

    def apply_in_background(self, actions: Sequence[Action]) -> None:
        """Map and unmap in the worker thread.

        No row is copied there: on a GPU the copy would be launched beside the kernels, and wait for none of them.
        """
        assert not any(isinstance(action, CopyRow) for action in actions), "rows are copied in the kernels' stream"
        if actions:
            self._wait()
            fence = kernels_so_far(self.driver.device)
            self._pending = self._worker.submit(self._perform_in_background, actions, fence, other_cores())

    def view(self, seq_ids: Sequence[int], lengths: Sequence[int], num_queries: Sequence[int]) -> BatchView:
        """Rows of these sequences."""
        self._wait()
        return self._make_view(lengths, num_queries, rows=[self._policy.row(seq_id) for seq_id in seq_ids])

    def physical(self) -> Physical:
        """Page-groups mapped and created, beside the memfd's blocks."""
        self._wait()
        return Physical(self.driver.mapped_bytes, self.driver.pooled_bytes, self.driver.counted_bytes())

    def driver_calls(self) -> DriverCalls:
        """Calls since the store was made; creating the pool is not among them."""
        self._wait()
        total, start, background = self.driver.totals(), self._at_start, self._background
        return DriverCalls(
            critical=total.calls - start.calls - background.calls,
            critical_s=(total.ns - start.ns - background.ns) / 1e9,
            background=background.calls,
            background_s=background.ns / 1e9,
            waited_s=self._waited_ns / 1e9,
        )

    def close(self) -> None:
        """Give everything back, then raise what went wrong in the background, if nobody has heard of it yet."""
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            self.driver.close()

    def _wait(self) -> None:
        """Wait for the background. Its errors surface here."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        started_ns = perf_counter_ns()
        try:
            pending.result()
        finally:
            self._waited_ns += perf_counter_ns() - started_ns

    def _perform_in_background(self, actions: Sequence[Action], fence: Callable[[], object], cores: set[int]) -> None:
        move_to(cores)
        before = self.driver.totals()
        try:
            self._perform(actions, fence)
        finally:
            after = self.driver.totals()
            self._background = CallTotals(
                self._background.calls + after.calls - before.calls, self._background.ns + after.ns - before.ns
            )

    def _perform(self, actions: Sequence[Action], fence: Callable[[], object]) -> None:
        """Where one fails, all that was mapped and unmapped before it is undone; copies are not, nobody reads them."""
        undo: list[tuple[Callable[[Sequence[MapRun]], None], list[MapRun]]] = []
        try:
            for kind, runs in groupby(_runs(actions), key=lambda run: type(run[0])):
                if kind is CopyRow:
                    self._copy(Runs.of_rows([action for run in runs for action in run], self._row_bytes))
                    fence = kernels_so_far(self.driver.device)  # what is unmapped next may be being copied
                elif kind is Map:
                    where = [place for run in runs for place in self._in_every_tensor(run)]
                    self.driver.map_runs(where)
                    undo.append((self.driver.unmap_runs, where))
                elif kind is Unmap:
                    where = [place for run in runs for place in self._in_every_tensor(run)]
                    fence()  # a kernel may be reading what goes
                    self.driver.unmap_runs(where)
                    undo.append((self.driver.map_runs, where))
                else:
                    raise ValueError(f"VirtualStore performs no {kind.__name__}")
        except BaseException:
            for reverse, where in reversed(undo):
                reverse(where)
            raise

    def _offset(self, where: Map | Unmap) -> int:
        """Bytes from the start of a tensor to a page-group of a row."""
        return where.row * self._row_bytes + where.ordinal * self._page_group

    def _in_every_tensor(self, run: Sequence[Map | Unmap]) -> Iterator[MapRun]:
        """Page-groups side by side in a row, tensor by tensor."""
        offset, per_tensor = self._offset(run[0]), self._policy.page_groups_per_tensor
        for tensor, base in enumerate(self._bases):
            yield MapRun(base, offset, [self._handles[tensor * per_tensor + action.page_group] for action in run])


def _runs(actions: Sequence[Action]) -> Iterator[list[Any]]:
    """Split actions, in order, into copies, and runs of one kind over neighbours in one row, ascending by position."""
    run: list[Any] = []  # of one kind
    for action in actions:
        if run and not _continues(run[-1], action):
            yield run[::-1] if isinstance(run[0], Unmap) else run
            run = []
        run.append(action)
    if run:
        yield run[::-1] if isinstance(run[0], Unmap) else run


def _continues(last: Action, action: Action) -> bool:
    match last, action:
        case (CopyRow(), CopyRow()):
            return True
        case (Map(), Map()):
            return (last.row, last.ordinal + 1) == (action.row, action.ordinal)
        case (Unmap(), Unmap()):
            return (last.row, last.ordinal - 1) == (action.row, action.ordinal)
    return False

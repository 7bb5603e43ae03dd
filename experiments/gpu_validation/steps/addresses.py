"""Tensors over reserved addresses, and what the documentation of CUDA's virtual memory leaves open."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from kvarena.allocators.sizes import GB
from kvarena.allocators.vmm.driver import Driver, OutOfPhysicalMemory
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.allocators.vmm.tensor import bytes_at, strided_tensor
from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.kernels import PAGE_GROUP, SHAPES, check, kernel_to_run
from kvarena.harness.measured.memory import available_bytes
from kvarena.kernels.append import append
from kvarena.kernels.layout import Layout
from kvarena.kernels.random_batch import Batch, random_batch
from kvarena.kernels.view import LayerCache

SLOTS = 8
SQUARE = {"cuda": 4096, "cpu": 64}  # twenty products of it keep a GPU busy for some tens of milliseconds


def cases(device: str) -> list[str]:
    """Names of the questions."""
    return list(_QUESTIONS)


def uses(case: str) -> list[str]:
    """Our kernel."""
    return ["kvarena.kernels.triton_attention"]


def run(case: str, context: Context) -> Values:
    """Answer one of them."""
    with closing(make_driver(context.device, PAGE_GROUP[context.device])) as driver:
        return _QUESTIONS[case](driver, context)


def _before_anything_is_mapped(driver: Driver, context: Context) -> Values:
    """A tensor is made before anything is mapped, and is the memory that is mapped later."""
    size = driver.page_group_bytes
    base = driver.reserve(SLOTS * size)
    start = perf_counter()
    span = bytes_at(base, SLOTS * size, torch.device(context.device), driver)
    taken_us = 1e6 * (perf_counter() - start)
    driver.map(base, 2 * size, driver.create(2))
    span[2 * size : 4 * size] = 7
    _require(span.data_ptr() == base, "the tensor lies elsewhere")
    _require(int(span[2 * size : 4 * size].sum(dtype=torch.int64)) == 14 * size, "other bytes were read back")
    return {"making the tensor, us": round(taken_us, 1)}


def _scattered_and_aliased(driver: Driver, context: Context) -> Values:
    """Page-groups lie side by side in any order, move with their bytes, and can be seen at two addresses."""
    memory, base, handles = _mapped(driver, SLOTS)
    memory[:] = torch.arange(SLOTS, dtype=torch.int32, device=memory.device)[:, None]
    _synchronize(context)
    driver.unmap(base, 0, SLOTS)
    order = [5, 2, 7, 0, 0]
    driver.map(base, 0, [handles[i] for i in order])
    _require(memory[: len(order), 0].tolist() == order == memory[: len(order), -1].tolist(), "bytes did not move along")
    memory[3] = 9
    _require(bool((memory[4] == 9).all()), "an alias shows other bytes")
    return {"mapped bytes": driver.mapped_bytes, "counted bytes": driver.counted_bytes()}


def _new_memory(driver: Driver, context: Context) -> Values:
    """What fresh page-groups hold. Both answers are right; kernels that weigh it with 0 want finite numbers."""
    memory, _, _ = _mapped(driver, 32)
    zero = bool((memory == 0).all())
    finite = bool(memory.view(torch.bfloat16).isfinite().all())
    return {"zero": zero, "finite as bfloat16": finite}


def _unmapped_at_once(driver: Driver, context: Context) -> Values:
    """Mappings made one by one are unmapped by one call over all of them."""
    size = driver.page_group_bytes
    base, handles = driver.reserve(SLOTS * size), driver.create(SLOTS)
    for slot, handle in enumerate(handles):
        driver.map(base, slot * size, [handle])
    calls = driver.calls.get("unmap", (0, 0))[0]
    driver.unmap(base, 0, SLOTS)
    driver.release(handles)
    _require(driver.counted_bytes() == 0, "the driver still counts memory")
    return {"mappings": SLOTS, "calls": driver.calls["unmap"][0] - calls}


def _beside_kernels(driver: Driver, context: Context) -> Values:
    """Mapping does not wait for kernels that read other page-groups of the same range, nor disturb them."""
    size, words = driver.page_group_bytes, driver.page_group_bytes // 4
    base, handles = driver.reserve(SLOTS * size), driver.create(SLOTS)
    memory = strided_tensor(driver, base, torch.int32, (SLOTS, words), (size, 4))
    driver.map(base, 0, handles[:1])
    memory[0] = 1
    side = SQUARE[context.device]
    square = torch.ones(side, side, device=context.device)
    for _ in range(20):
        square = (square @ square).clamp(max=1)
    total = memory[0].sum()
    start = perf_counter()
    driver.map(base, size, handles[1:])
    mapped_us = 1e6 * (perf_counter() - start) / (SLOTS - 1)
    running = context.on_gpu and not torch.cuda.current_stream().query()
    memory[1:] = 2
    _require(int(total) == words and int(memory[1:].sum()) == 2 * (SLOTS - 1) * words, "a kernel read other bytes")
    return {"map, us each": round(mapped_us, 1), "kernels were still running": running}


def _base_unmapped(driver: Driver, context: Context) -> Values:
    """Kernels write and read row 1 of tensors whose row 0, where their address is, has nothing behind it."""
    name, shapes = ("triton", SHAPES["cuda"][0]) if context.on_gpu else ("numba", SHAPES["cpu"][0])
    item, head, token = (count * shapes.dtype.itemsize for count in (1, shapes.size, shapes.heads * shapes.size))
    strides, tokens = (driver.page_group_bytes, token, head, item), driver.page_group_bytes // token
    k, v = (_second_row(driver, shapes.dtype, (2, tokens, shapes.heads, shapes.size), strides) for _ in range(2))
    cache, gaps = LayerCache(Layout.CONTIGUOUS, k, v), {}
    for phase, queries in (("prefill", tokens), ("decode", 1)):
        batch = random_batch(shapes, [tokens], [queries])
        assert batch.view.rows is not None
        [row], view = batch.view.rows.tolist(), replace(batch.view, rows=torch.ones_like(batch.view.rows))
        new = slice(tokens - queries, tokens)
        append(batch.cache.k[row, new], batch.cache.v[row, new], cache, view)
        gaps[f"gap, {phase}"] = check(kernel_to_run(name, context), Batch(batch.q, cache, view))
    return gaps


def _out_of_memory(driver: Driver, context: Context) -> Values:
    """More than there is is refused, and nothing of it is kept."""
    large = GB if context.on_gpu else driver.page_group_bytes
    too_much = 2 * available_bytes(torch.device(context.device)) // large + 1
    with closing(make_driver(context.device, large)) as greedy:
        try:
            greedy.create(too_much)
        except OutOfPhysicalMemory as error:
            _require(greedy.counted_bytes() == 0, "page-groups were kept")
            return {"refused with": str(error)[:120]}
    raise FailedError(f"{too_much} page-groups were created, twice what there is")


_QUESTIONS: dict[str, Callable[[Driver, Context], Values]] = {
    "a tensor before anything is mapped": _before_anything_is_mapped,
    "scattered page-groups, aliases": _scattered_and_aliased,
    "what new memory holds": _new_memory,
    "one unmap over several mappings": _unmapped_at_once,
    "mapping beside running kernels": _beside_kernels,
    "kernels where the first row is not mapped": _base_unmapped,
    "running out of memory": _out_of_memory,
}


def _mapped(driver: Driver, slots: int) -> tuple[Tensor, int, list[int]]:
    """[slots, ints of a page-group], all mapped; its base; the handles."""
    size = driver.page_group_bytes
    base, handles = driver.reserve(slots * size), driver.create(slots)
    driver.map(base, 0, handles)
    return strided_tensor(driver, base, torch.int32, (slots, size // 4), (size, 4)), base, handles


def _second_row(driver: Driver, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Two rows of a page-group each, of which only the second is mapped."""
    base = driver.reserve(2 * driver.page_group_bytes)
    driver.map(base, driver.page_group_bytes, driver.create(1))
    return strided_tensor(driver, base, dtype, shape, strides)


def _synchronize(context: Context) -> None:
    if context.on_gpu:
        torch.cuda.synchronize()


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FailedError(otherwise)

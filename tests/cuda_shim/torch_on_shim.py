"""A pytest plugin: torch as it would be on a GPU, where the GPU is the shim's and its memory the host's.

The project runs unchanged with device=cuda, through `cuda.bindings` and the shim. Torch built for CPUs has no such
tensors, so it is told a little less than the truth, here alone:

    tensors         lie on the host, and answer `cuda:0` when they are asked for their device
    pinned memory   is the shim's (cuMemHostAlloc), and what is copied out of it or into it goes through cuMemcpyAsync
    torch.cuda      events, synchronizing and memory are the driver's, through the same bindings
    a launch        of a Triton kernel is interpreted; before, its tensors are asked about as Triton's launcher does
    a CUDA graph    is the operations and launches of a step, done again on the same memory (`fake_graph.py`)

Nothing is asked of the driver before a tensor, an event or a kernel needs it: a process that only forks others never
does.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace

import torch
import triton
from cuda.bindings import driver as bindings
from fake_graph import FakeGraph
from shim import Shim
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from kvarena.allocators.vmm.cuda_context import CudaContext
from kvarena.allocators.vmm.tensor import bytes_at

NAME = "a shim of CUDA's driver"
PROPERTIES = SimpleNamespace(name=NAME, total_memory=4 << 30, multi_processor_count=4)
GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
POINTER = bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
SHIM = Shim()

pinned: dict[int, int] = {}  # address -> bytes
launches: list[str] = []  # names of kernels
capturing: list[FakeGraph] = []  # the graph that is being captured, if any

_torchs_own = cache(CudaContext)


def CONTEXT(function: str, *arguments: object):
    """A call of the driver in torch's own context."""
    return _torchs_own()(function, *arguments)


class PinnedMemory:
    """Lives as long as a tensor over it."""

    def __init__(self, num_bytes: int) -> None:
        self.address = int(CONTEXT("cuMemHostAlloc", num_bytes, 0))
        pinned[self.address] = num_bytes
        weakref.finalize(self, self.free, self.address)

    @staticmethod
    def free(address: int) -> None:
        del pinned[address]
        bindings.cuMemFreeHost(address)


def pinned_like(made: Tensor) -> Tensor:
    """A copy of what torch made, in pinned memory."""
    if made.nbytes == 0:
        return made
    memory = PinnedMemory(made.nbytes)
    return bytes_at(memory.address, made.nbytes, HOST, memory).view(made.dtype).view(made.shape).copy_(made)


def is_pinned(x: Tensor) -> bool:
    return any(start <= x.data_ptr() < start + size for start, size in pinned.items())


def copy(target: Tensor, source: Tensor) -> Tensor:
    """What `target.copy_(source)` does; across the bus, as the driver does it."""
    crosses = is_pinned(target) != is_pinned(source)
    if crosses and target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype:
        assert target.shape == source.shape
        CONTEXT("cuMemcpyAsync", target.data_ptr(), source.data_ptr(), source.nbytes, 0)
        return target
    return target.copy_(source)


class OnTheShim(TorchFunctionMode):
    """Tensors whose device is the shim's GPU."""

    def __torch_function__(self, function: Callable[..., object], types: object, args=(), kwargs=None) -> object:
        kwargs = dict(kwargs or {})
        if function == torch.device:
            return function(*args, **kwargs)
        if function == Tensor.device.__get__:
            return GPU
        if function == Tensor.is_pinned:
            return is_pinned(*args)
        if function == Tensor.copy_:
            return copy(*args[:2])
        args = tuple(HOST if on_gpu(x) else x for x in args)
        to_gpu = on_gpu(kwargs.get("device")) or (function == Tensor.to and HOST in args[1:])
        if on_gpu(kwargs.get("device")):
            kwargs["device"] = HOST
        if function == Tensor.to and to_gpu and is_pinned(args[0]):
            return copy(torch.empty_like(args[0]), args[0])
        in_pinned = kwargs.pop("pin_memory", False)
        made = function(*args, **kwargs)
        return pinned_like(made) if in_pinned else made


def on_gpu(x: object) -> bool:
    return isinstance(x, torch.device | str) and str(x).split(":")[0] == "cuda"


def storage_at(construct: Callable[..., object], address: int, device: torch.device, num_bytes: int) -> object:
    """A GPU's, which has a number, or the host's: in either case it lies on the host."""
    assert device in (GPU, HOST)
    return construct(address, HOST, num_bytes)


class Event:
    """`torch.cuda.Event` over the bindings."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.event = CONTEXT("cuEventCreate", 0 if enable_timing else 2)
        weakref.finalize(self, bindings.cuEventDestroy, self.event)

    def record(self) -> None:
        CONTEXT("cuEventRecord", self.event, 0)

    def synchronize(self) -> None:
        CONTEXT("cuEventSynchronize", self.event)

    def query(self) -> bool:
        CONTEXT("cuEventQuery", self.event)
        return True

    def elapsed_time(self, last: "Event") -> float:
        return CONTEXT("cuEventElapsedTime", self.event, last.event)


class Launched(interpreter.GridExecutor):
    """A launch asks the driver about every tensor that it is handed, as Triton's launcher does.

    What torch allocated is the host's here, where it would be the driver's; so only reserved addresses are asked for.
    """

    def __call__(self, *args: object, **kwargs: object) -> None:
        for number, x in enumerate(args):
            if isinstance(x, Tensor) and SHIM.reserves(x.data_ptr()):
                try:
                    CONTEXT("cuPointerGetAttribute", POINTER, x.data_ptr())
                except RuntimeError as error:  # the launcher's own words
                    raise ValueError(
                        f"Pointer argument (at {number}) cannot be accessed from Triton (cpu tensor?)"
                    ) from error
        launches.append(self.fn.__name__)
        with _disable_current_modes():  # what the interpreter does with torch is no part of a graph
            super().__call__(*args, **kwargs)
        if capturing:
            capturing[-1].operations.append((super().__call__, args, kwargs, None))


@contextmanager
def captured(graph: FakeGraph, pool: object = None, capture_error_mode: str = "global"):
    """`torch.cuda.graph`."""
    capturing.append(graph)
    try:
        with graph:
            yield
    finally:
        capturing.pop()


class Generator(torch.Generator):
    """Draws on the host, whichever device it is for."""

    def __new__(cls, device: object = HOST) -> "Generator":
        return super().__new__(cls, HOST)


class Stream:
    """`torch.cuda.Stream`: whatever is started in it is done at once."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def query(self) -> bool:
        return True


def pytest_configure() -> None:
    """Give torch its GPU, before any module of tests is imported."""
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 is not set"
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.init = lambda: None
    cuda.Event = Event
    cuda.synchronize = lambda device=None: CONTEXT("cuCtxSynchronize")
    cuda.mem_get_info = lambda device=None: _torchs_own().free_and_total_bytes()
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_properties = lambda device=None: PROPERTIES
    torch.Generator = Generator
    cuda.Stream = cuda.current_stream = Stream
    cuda.stream = lambda stream: nullcontext()
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = FakeGraph, captured, lambda: None
    torch._C._construct_storage_from_data_pointer = partial(storage_at, torch._C._construct_storage_from_data_pointer)
    interpreter.GridExecutor = Launched
    OnTheShim().__enter__()  # for the rest of the process

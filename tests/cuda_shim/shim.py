"""The shim of CUDA's driver, as tests see it: built once, told what to fail, asked what is alive."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from kvarena.allocators.sizes import GB, MB
from kvarena.harness.paths import ROOT

SOURCE = Path(__file__).with_name("libcuda.c")
COMPILER = shutil.which(os.environ.get("CC", "cc"))
UNKNOWN, OUT_OF_MEMORY = 999, 2  # CUresult


def build(folder: Path) -> Path:
    """The folder, in which there is a libcuda.so.1 now."""
    assert COMPILER is not None
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    library = folder / "libcuda.so.1"
    command = [COMPILER, *flags, f"-Wl,-soname,{library.name}", "-o", library, SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of a child process that finds the library in `folder`, and the modules that stand for a GPU."""
    here = SOURCE.parent
    path = os.pathsep.join(map(str, [here, here.parent, ROOT / ".import"]))
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "TRITON_INTERPRET": "1", "PYTHONPATH": path}


class Live(NamedTuple):
    """What is alive on the GPU."""

    reservations: int
    handles: int
    mappings: int
    accessible: int  # of the mappings
    allocations: int  # of pinned and of device memory
    objects: int  # streams, events
    contexts: int  # how often the primary one is retained
    taken: int  # bytes behind handles, and behind mappings of released ones


class Shim:
    """The library that this process has loaded for libcuda.so.1."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.shim_failed.restype = ctypes.c_char_p
        self._library.shim_calls.restype = ctypes.c_uint64

    def live(self) -> Live:
        counts = (ctypes.c_uint64 * len(Live._fields))()
        self._library.shim_live(counts)
        return Live(*counts)

    def fail(self, function: str = "", after: int = 0, result: int = UNKNOWN) -> None:
        """The call of `function` (of any) after `after` more of them fails, once, and does nothing; 0 disarms."""
        self._library.shim_fail(function.encode(), ctypes.c_uint64(after), result)

    @property
    def failed(self) -> str:
        """The function that was made to fail; empty where none has been yet."""
        return self._library.shim_failed().decode()

    @property
    def calls(self) -> int:
        """Calls of the driver so far."""
        return self._library.shim_calls()

    def sizes(self, granularity: int = 2 * MB, memory: int = 4 * GB) -> None:
        """What this GPU maps multiples of, and all the memory that it has."""
        self._library.shim_sizes(ctypes.c_uint64(granularity), ctypes.c_uint64(memory))

    def reserves(self, address: int) -> bool:
        """Whether an address lies in a reservation."""
        return bool(self._library.shim_reserved(ctypes.c_uint64(address)))

"""How many threads compute: one number for torch and numba alike.

On two cores a second pool of OpenMP threads beside torch's stalls either for milliseconds, so one thread is the
default there. `run.sh` sets `OMP_WAIT_POLICY=PASSIVE` before torch is imported: idle threads then sleep, and do not
spin on the cores that the other pool wants.
"""

import os

_SMALL_MACHINE = 2  # cores

_threads: int | None = None


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """One on a small machine, else one per core."""
    cores = usable_cores()
    return 1 if cores <= _SMALL_MACHINE else cores


def compute_threads() -> int:
    """Threads that kernels use: what `set_compute_threads` said, else the default."""
    return default_threads() if _threads is None else _threads


def set_compute_threads(threads: int | None = None) -> int:
    """Let torch and our kernels compute with this many threads (None: the default); returns the number.

    Our kernels ask for it call by call (`numba_attention.py`), so that a run on a GPU never loads numba.
    """
    import torch

    global _threads
    _threads = default_threads() if threads is None else threads
    torch.set_num_threads(_threads)
    return _threads

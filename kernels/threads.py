"""How many threads compute: one number for torch and numba alike.

On two cores a second pool of OpenMP threads beside torch's stalls either for milliseconds, so one thread is the
default there. `run.sh` sets `OMP_WAIT_POLICY=PASSIVE` before torch is imported: idle threads then sleep, and do not
spin on the cores that the other pool wants.
"""

import os
from pathlib import Path

from kvarena.cgroups import cpu_quota

_SMALL_MACHINE = 2  # cores

_threads: int | None = None


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those it may run on, and no more than its control groups give it time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def default_threads() -> int:
    """What the environment asks of OpenMP, or a cluster gives the task; else one on a small machine or one per core."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        asked = os.environ.get(name, "").partition(",")[0]  # OpenMP takes a number for each level
        if asked.isdigit() and int(asked) > 0:
            return int(asked)
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

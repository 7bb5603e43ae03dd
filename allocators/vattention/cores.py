"""A core for a thread that works beside another.

The system wakes a thread where there is room, and on a machine with other work that may be the very core of the
thread that woke it: the two then take turns, and nothing is hidden.
"""

import ctypes
import os

_getcpu = ctypes.CDLL(None).sched_getcpu


def other_cores() -> set[int]:
    """Cores of this thread but the one it runs on; empty where it has only one."""
    return os.sched_getaffinity(0) - {_getcpu()}


def move_to(cores: set[int]) -> None:
    """Let this thread run on these cores alone; of none, it stays where it is."""
    if cores:
        os.sched_setaffinity(0, cores)

"""How much physical memory this process may still take."""

import os
from pathlib import Path

from kvarena.cgroups import memory_left


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still become resident: the kernel kills a process that takes more, it does not refuse."""
    left = memory_left(root)
    return _mem_available(root) if left is None else min(left, _mem_available(root))


def _mem_available(root: Path) -> int:
    """What the machine has left, reclaimable pages included; free pages alone where /proc does not tell."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return told[0] if told else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

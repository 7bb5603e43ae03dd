"""How much memory the machine has left, asked before it is taken."""

import os

import torch


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the host without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return min(int(line.split()[1]) * 1024, _cgroup_left())
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_left() -> int:
    """Bytes left under a container's limit; unbounded where there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as limit:
            most = limit.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="utf-8") as current:
            used = int(current.read())
    except OSError:
        return 1 << 62
    return 1 << 62 if most == "max" else max(0, int(most) - used)


def human(num_bytes: float) -> str:
    """Bytes as people say them: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"

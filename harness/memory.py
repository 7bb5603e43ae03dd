"""How much memory the machine has left, asked before it is taken."""

import torch

from kvarena.allocators.vmm.available import available_bytes as host_bytes


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the host without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return host_bytes()


def human(num_bytes: float) -> str:
    """Bytes as people say them: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"

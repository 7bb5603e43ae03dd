"""How much memory the machine has left, asked before it is taken."""

import torch

from kvarena.allocators.vmm.available import available_bytes as host_bytes


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the host without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return host_bytes()

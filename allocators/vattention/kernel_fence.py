"""When memory may be unmapped: after every kernel that may still read it has run.

Actions of a step are decided, and handed to the store, before its kernels are launched. What a policy unmaps is no
longer needed by any sequence of that step: rows that went idle, page-groups past a row's length. So only kernels
launched *before* the actions can still be reading it, and those are what a fence waits for; the step's own kernels may
run meanwhile. Mapping needs no fence: it touches only addresses that no kernel reads yet.
"""

from collections.abc import Callable

import torch


def kernels_so_far(device: str) -> Callable[[], object]:
    """Mark the kernels launched so far on the current stream; calling the result waits for them, in any thread."""
    if device == "cpu":  # kernels have run when they return
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize

"""A CUDA graph by what it is: a list of operations on given tensors.

Every operation of a step is noted as torch dispatches it, and a replay does the same on the same memory again, with
nothing of Python's between.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph(TorchDispatchMode):
    """Records operations while it is entered; `replay` does them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        with torch.inference_mode():
            for function, args, kwargs, result in self.operations:
                for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

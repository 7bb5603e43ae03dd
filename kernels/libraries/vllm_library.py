"""CUDA libraries out of vLLM's wheel, loaded without any of vLLM's Python.

The wheel is taken for its compiled kernels alone: `torch.ops.load_library` is all they need, so a file that was cut
out of a wheel will do. Each fits one release of torch (the pairs are listed in pyproject.toml).
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvarena.errors import UserError
from kvarena.kernels.spec import KernelSpec


def load_operators(spec: KernelSpec, namespace: str, file: str) -> Any:
    """The operators `torch.ops.<namespace>` of `file`, a path inside the package vllm.

    Raises UserError where there is no GPU, no such file, or one that this torch cannot load.
    """
    if not torch.cuda.is_available():
        raise UserError(f"kernel={spec.name}: needs a CUDA GPU; torch {torch.__version__} sees none here")
    path = library_path(spec, file)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(
            f"kernel={spec.name}: torch {torch.__version__} cannot load {path}: {error}. "
            "A vLLM wheel fits one release of torch; pyproject.toml lists which go together"
        ) from error
    return getattr(torch.ops, namespace)


def library_path(spec: KernelSpec, file: str) -> Path:
    """Where the library lies: the file its environment variable names, else the installed vLLM's.

    Raises UserError where there is neither, or it lacks the library.
    """
    named = os.environ.get(spec.library_variable)
    package = find_spec("vllm")
    if named:
        path, origin = Path(named), spec.library_variable
    elif package is not None and package.submodule_search_locations:
        path, origin = Path(package.submodule_search_locations[0]) / file, "the installed vllm"
    else:
        raise UserError(f"kernel={spec.name}: needs vllm, not installed; {spec.install_hint}")
    if not path.is_file():
        raise UserError(f"kernel={spec.name}: {origin} has no {path}; {spec.install_hint}")
    return path

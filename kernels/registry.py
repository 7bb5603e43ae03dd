"""Kernels by name, and whether one fits. Imports no torch until a kernel is made."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from kvarena.errors import UserError, does_not_run
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import KernelSpec

if TYPE_CHECKING:
    from kvarena.kernels.kernel import AttentionKernel

_COMPILERS = ("g++", "clang++")


def kernel_names() -> list[str]:
    """Names of all kernels."""
    return list(CATALOGUE)


def kernel_spec(name: str) -> KernelSpec:
    """What the kernel can read. Raises UserError with the names that exist."""
    if name not in CATALOGUE:
        raise UserError(f"kernel={name}: no such kernel. There are: {', '.join(CATALOGUE)}")
    return CATALOGUE[name][0]


def pairing(spec: KernelSpec) -> str:
    """What a comparison of the kernel's systems with others of that word isolates; `same body`: the layout alone."""
    return "same body" if spec.library == "kvarena" and spec.layouts == frozenset(Layout) else "same library"


def get_kernel(name: str) -> "AttentionKernel":
    """Make the kernel; imports its library. Raises UserError where it does not exist or cannot run here."""
    spec = kernel_spec(name)
    if reason := missing(spec):
        raise UserError(f"kernel={name}: {reason}")
    _, module, kernel_class = CATALOGUE[name]
    try:
        made: type[AttentionKernel] = getattr(import_module(module), kernel_class)
    except Exception as error:  # of any kind: it is whatever the file does
        path = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
        raise does_not_run(path, error) from error
    if lacking := sorted(getattr(made, "__abstractmethods__", ())):
        raise UserError(f"kernel={name}: {kernel_class} lacks {', '.join(lacking)}, which a kernel must have")
    return made()


def missing(spec: KernelSpec) -> str | None:
    """Say what the kernel needs and this environment lacks."""
    hint = f"; {spec.install_hint}" if spec.install_hint else ""
    absent = [module for module in spec.requires if find_spec(module) is None]
    if absent and not os.environ.get(spec.library_variable):
        return f"needs {', '.join(absent)}, not installed{hint}"
    if spec.needs_cxx and _compiler() is None:
        return f"needs a C++ compiler, and finds none of {', '.join(_COMPILERS)}{hint}"
    return None


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := which(name))), None)


def fits(
    spec: KernelSpec,
    layout: Layout,
    device: str | None = None,
    dtype: str | None = None,
    head_size: int | None = None,
    block_size: int | None = None,
) -> str | None:
    """Say why the kernel cannot read this, or None if it can. What is not given is not asked."""
    if layout not in spec.layouts:
        return f"reads {_list(spec.layouts)}, not {layout}"
    if device is not None and device not in spec.devices:
        return f"runs on {_list(spec.devices)}, not {device}"
    if dtype is not None and dtype not in spec.dtypes:
        return f"reads {_list(spec.dtypes)}, not {dtype}"
    if head_size is not None and spec.head_sizes is not None and head_size not in spec.head_sizes:
        return f"head sizes {_list(spec.head_sizes)}, not {head_size}"
    paged_block = block_size if layout is Layout.PAGED else None
    if paged_block is not None and spec.block_sizes is not None and paged_block not in spec.block_sizes:
        return f"block sizes {_list(spec.block_sizes)}, not {paged_block}"
    if layout is Layout.PAGED and device is not None and spec.block_operator:
        return _lacks_block_tables(spec.block_operator)
    return None


def _lacks_block_tables(operator: str) -> str | None:
    """Why this torch's operator reads no blocks, as its schema says."""
    import torch

    schema = getattr(torch.ops.aten, operator).default._schema
    if any(argument.name == "block_table" for argument in schema.arguments):
        return None
    return f"reads rows alone: {operator} of torch {torch.__version__} takes no block tables"


def _list(values: frozenset[int] | frozenset[str] | frozenset[Layout]) -> str:
    return ", ".join(str(value) for value in sorted(values))

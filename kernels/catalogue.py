"""The kernels there are, as data, and where each is written."""

from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import KernelSpec

_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_ANY_DEVICE = frozenset({"cpu", "cuda"})
_ANY_DTYPE = frozenset({"float32", "bfloat16", "float16"})

NUMBA = KernelSpec(
    name="numba",
    body="numba",
    library="kvarena",
    layouts=frozenset(Layout),
    devices=_CPU,
    dtypes=frozenset({"float32", "bfloat16"}),
    head_sizes=frozenset(range(16, 257, 16)),
)
SDPA = KernelSpec(
    name="sdpa",
    body="torch sdpa",
    library="torch",
    layouts=frozenset({Layout.CONTIGUOUS}),
    devices=_ANY_DEVICE,
    dtypes=_ANY_DTYPE,
)
GATHER_SDPA = KernelSpec(
    name="gather_sdpa",
    body="gather, then torch sdpa",
    library="torch",
    layouts=frozenset({Layout.PAGED}),
    devices=_ANY_DEVICE,
    dtypes=_ANY_DTYPE,
)
FLEX = KernelSpec(
    name="flex",
    body="torch flex_attention",
    library="torch",
    layouts=frozenset({Layout.PAGED}),
    devices=_CPU,
    dtypes=frozenset({"float32", "bfloat16"}),
    needs_cxx=True,
    install_hint="install one (Debian: apt install g++) or set CXX",
)
TRITON = KernelSpec(
    name="triton",
    body="triton",
    library="kvarena",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_ANY_DTYPE,
    head_sizes=frozenset({16, 32, 64, 128, 256}),
    block_sizes=frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256}),
    requires=("triton",),
    install_hint="torch's CUDA build brings it",
)

# name -> what it can read, module, class
CATALOGUE: dict[str, tuple[KernelSpec, str, str]] = {
    "numba": (NUMBA, "kvarena.kernels.numba_attention", "NumbaAttention"),
    "sdpa": (SDPA, "kvarena.kernels.sdpa", "SDPAAttention"),
    "gather_sdpa": (GATHER_SDPA, "kvarena.kernels.gather_sdpa", "GatherSDPAAttention"),
    "flex": (FLEX, "kvarena.kernels.flex", "FlexAttention"),
    "triton": (TRITON, "kvarena.kernels.triton_attention", "TritonAttention"),
}

"""The kernels there are, as data, and where each is written."""

from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import KernelSpec

_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_ANY_DEVICE = frozenset({"cpu", "cuda"})
_ANY_DTYPE = frozenset({"float32", "bfloat16", "float16"})
_HALF = frozenset({"bfloat16", "float16"})
_VLLM_HINT = "pip install -e '.[flash-attn]', or name the library's file in"

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
    in_graph=True,
)
FA3 = KernelSpec(
    name="fa3",
    body="FlashAttention 3",
    library="FlashAttention 3 of vllm",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_HALF,
    head_sizes=frozenset(range(8, 257, 8)),
    requires=("vllm",),
    install_hint=f"{_VLLM_HINT} KVARENA_FA3_SO",
    reads_past=191,  # to the end of a tile; read from the library's sources, to be seen on a GPU
    library_variable="KVARENA_FA3_SO",
    in_graph=True,
)
FA2 = KernelSpec(
    name="fa2",
    body="FlashAttention 2",
    library="FlashAttention 2 of vllm",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_HALF,
    head_sizes=frozenset(range(8, 257, 8)),
    block_sizes=frozenset(range(16, 257, 16)),
    requires=("vllm",),
    install_hint=f"{_VLLM_HINT} KVARENA_FA2_SO",
    library_variable="KVARENA_FA2_SO",
    in_graph=True,
)
FLASH_ATTN = KernelSpec(
    name="flash_attn",
    body="FlashAttention 2",
    library="flash-attn",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_HALF,
    head_sizes=frozenset(range(8, 257, 8)),
    block_sizes=frozenset({256}),
    requires=("flash_attn",),
    install_hint="pip install flash-attn --no-build-isolation (compiles CUDA for an hour, or finds a wheel)",
    in_graph=True,
)
TORCH_FLASH = KernelSpec(
    name="torch_flash",
    body="FlashAttention 2",
    library="torch",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_HALF,
    head_sizes=frozenset(range(8, 257, 8)),
    block_sizes=frozenset({256}),
    in_graph=True,
)
FLASHINFER = KernelSpec(
    name="flashinfer",
    body="FlashInfer",
    library="flashinfer",
    layouts=frozenset(Layout),
    devices=_CUDA,
    dtypes=_HALF,
    head_sizes=frozenset({64, 128, 256}),
    requires=("flashinfer",),
    install_hint="pip install -e '.[gpu]'; it compiles its kernels when they first run, which takes nvcc",
)
VLLM_PAGED = KernelSpec(
    name="vllm_paged",
    body="vllm paged_attention, over a copy in its own layout",
    library="vllm",
    layouts=frozenset({Layout.PAGED}),
    devices=_CUDA,
    dtypes=_ANY_DTYPE,
    head_sizes=frozenset({32, 64, 80, 96, 112, 120, 128, 192, 256}),
    block_sizes=frozenset({8, 16, 32}),
    requires=("vllm",),
    install_hint="pip install 'vllm<0.25' (0.25 dropped it), or name its _C library in KVARENA_VLLM_SO",
    library_variable="KVARENA_VLLM_SO",
)

# name -> what it can read, module, class
CATALOGUE: dict[str, tuple[KernelSpec, str, str]] = {
    "numba": (NUMBA, "kvarena.kernels.numba_attention", "NumbaAttention"),
    "sdpa": (SDPA, "kvarena.kernels.torch.sdpa", "SDPAAttention"),
    "gather_sdpa": (GATHER_SDPA, "kvarena.kernels.torch.gather_sdpa", "GatherSDPAAttention"),
    "flex": (FLEX, "kvarena.kernels.torch.flex", "FlexAttention"),
    "triton": (TRITON, "kvarena.kernels.triton_attention", "TritonAttention"),
    "fa3": (FA3, "kvarena.kernels.libraries.fa3", "FA3Attention"),
    "fa2": (FA2, "kvarena.kernels.libraries.fa2", "FA2Attention"),
    "flash_attn": (FLASH_ATTN, "kvarena.kernels.libraries.flash_attn", "FlashAttnAttention"),
    "torch_flash": (TORCH_FLASH, "kvarena.kernels.torch.torch_flash", "TorchFlashAttention"),
    "flashinfer": (FLASHINFER, "kvarena.kernels.libraries.flashinfer", "FlashInferAttention"),
    "vllm_paged": (VLLM_PAGED, "kvarena.kernels.libraries.vllm_paged", "VLLMPagedAttention"),
}

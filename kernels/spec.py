"""What a kernel can read, as data."""

from dataclasses import dataclass

from kvarena.kernels.layout import Layout

CPU = frozenset({"cpu"})
CUDA = frozenset({"cuda"})
ANY_DEVICE = CPU | CUDA
HALF = frozenset({"bfloat16", "float16"})
ANY_DTYPE = HALF | {"float32"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What a kernel can read. `None` means "any"."""

    name: str  # kernel=<name>
    body: str  # code that computes the attention: two layouts of one body differ in addressing alone
    library: str  # distribution the code comes from: two kernels of one library are a "same library" pair
    layouts: frozenset[Layout]
    devices: frozenset[str]  # of {"cpu", "cuda"}
    dtypes: frozenset[str]  # of {"float32", "bfloat16", "float16"}
    head_sizes: frozenset[int] | None = None
    block_sizes: frozenset[int] | None = None  # paged only
    block_operator: str = ""  # torch's, which reads blocks where it takes a `block_table`
    requires: tuple[str, ...] = ()  # importable modules it needs, beside torch
    install_hint: str = ""  # what to type where they are absent
    needs_cxx: bool = False  # compiles C++ when it first runs
    library_variable: str = ""  # environment variable that may name the library's file, in place of an installation
    reads_past: int = 0  # tokens past the length of a row that it may touch: they must be mapped, and finite
    in_graph: bool = False  # a decode may be captured in a CUDA graph

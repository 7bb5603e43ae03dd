"""Our Triton kernels compiled to machine code for GPUs that are not here, and what the compiler made of them."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvarena.kernels.triton_append import write_tokens
from kvarena.kernels.triton_body import attend, merge_splits
from kvarena.kernels.triton_launch import tiles

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a program, at most
RESERVED_BYTES = 1024  # of a program's shared memory, by CUDA
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
POINTERS = {"lengths": "*i32", "query_starts": "*i32"}
CACHE = {"k_address": "i64", "v_address": "i64"}
DECODE, CHUNK, PREFILL = 4, 64, 4096  # query rows


def compiled(kernel, capability, constants, types, unaligned=(), **options):
    """Compile as a launch would: strides and data are multiples of 16, as Triton finds them at run time."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name not in unaligned and name not in POINTERS]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled_attend(capability, dtype="bf16", size=128, rows=DECODE, block_size=0, splits=True):
    shape = tiles(size, BITS[dtype] // 8, rows)
    shape = shape.over_blocks() if block_size else shape
    types = {name: f"*{dtype}" for name in ("q", "out")} | POINTERS | CACHE
    types |= {"table": "*i32", "scale": "fp32"}
    constants = {"HEADS": 8, "GROUP": 4, "SIZE": size, "BLOCK_SIZE": block_size, "ALIGNED": 16}
    constants |= {"ROWS": shape.ROWS, "TILE": shape.TILE}
    if splits:
        types |= {"out": "*fp32", "log_total": "*fp32"}
    else:
        constants["log_total"] = None
    return compiled(
        attend,
        capability,
        constants,
        types,
        unaligned=("table", "table_stride", "row_tiles", "split_tokens", "split_stride", "scale"),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def assert_compiled(kernel, capability):
    assert len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("block_size", [0, 16], ids=["rows", "blocks"])
def test_decode(capability, block_size):
    kernel = compiled_attend(capability, block_size=block_size)
    assert_compiled(kernel, capability)
    # K and V come ahead of their use, 16 bytes a thread; only block numbers come by 4.
    widths = re.findall(r"cp\.async\.c[ag]\.shared\.global.*\], (0x\w+)", kernel.asm["ptx"])
    assert widths.count("0x10") >= 4 * 16
    assert set(widths) == ({"0x10", "0x4"} if block_size else {"0x10"})


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_prefill(capability):
    kernel = compiled_attend(capability, rows=PREFILL, block_size=16, splits=False)
    assert_compiled(kernel, capability)
    tensor_cores = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    assert tensor_cores[capability] in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "size", "rows", "block_size"),
    [
        ("fp16", 64, DECODE, 1),
        ("fp16", 64, PREFILL, 0),
        ("bf16", 128, CHUNK, 256),
        ("bf16", 256, DECODE, 16),
        ("bf16", 256, PREFILL, 16),
        ("fp32", 64, DECODE, 16),
        ("fp32", 128, CHUNK, 0),
    ],
)
def test_other_shapes(dtype, size, rows, block_size):
    assert_compiled(compiled_attend(90, dtype, size, rows, block_size), 90)


def test_a_stage_holds_as_much_in_either_layout():
    """One body, and the same K and V in flight; the block numbers are extra."""
    rows, blocks = (compiled_attend(90, block_size=size).metadata.shared for size in (0, 16))
    assert 0 <= blocks - rows <= 1024


def test_three_decode_programs_fit_on_a_multiprocessor():
    """As `triton_launch` reckons, for an H100 or H200: 228 KB of shared memory."""
    assert 3 * (compiled_attend(90, block_size=16).metadata.shared + RESERVED_BYTES) <= 228 * 1024


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_merge_and_append(capability):
    types = {"parts": "*fp32", "log_total": "*fp32", "out": "*bf16"}
    constants = {"QUERY_HEADS": 32, "SIZE": 128}
    unaligned = ("splits", "split_stride")
    assert_compiled(compiled(merge_splits, capability, constants, types, unaligned), capability)
    for block_size in (0, 16):
        types = {name: "*bf16" for name in ("k_new", "v_new")} | POINTERS | CACHE
        types["table"] = "*i32"
        constants = {"ELEMENTS": 1024, "WIDTH": 1024, "BLOCK_SIZE": block_size, "ALIGNED": 16}
        kernel = compiled(write_tokens, capability, constants, types, ("table", "table_stride"))
        assert_compiled(kernel, capability)
        assert "st.global.v4.b32" in kernel.asm["ptx"]

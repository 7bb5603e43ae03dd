"""The adapters of FlashAttention and PagedAttention, against fakes: operators with the libraries' own signatures.

A fake refuses what the library would refuse, then computes attention in float64 by the *library's* definition of its
arguments. So a wrong index, stride, length or type shows here, on a machine without a GPU.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvarena.errors import UserError
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.libraries import fa2, fa3, vllm_library, vllm_paged
from kvarena.kernels.libraries.flash_attn import FlashAttnAttention
from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.reference import attend_sequence, reference_attention
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing
from kvarena.kernels.torch import torch_flash

# Signatures as vLLM 0.20.2 and 0.30.0 declare them, and torch 2.11 and 2.13.
FA3_FORWARD = """forward(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,
float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
FA2_FORWARD = """forward(Tensor! q, Tensor kcache, Tensor vcache, Tensor? k, Tensor? v, Tensor? seqlens_k,
Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, Tensor? leftpad_k, Tensor? block_table,
Tensor? alibi_slopes, Tensor!? out, float softmax_scale, bool is_causal, int window_size_left, int window_size_right,
float softcap, bool is_rotary_interleaved, int num_splits) -> Tensor[]"""
TORCH_2_11 = """forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q,
SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None,
SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None)
-> (Tensor, Tensor, Tensor, Tensor, Tensor)"""
TORCH_2_13 = TORCH_2_11.replace(
    "alibi_slopes=None", "alibi_slopes=None, Tensor? block_table=None, int? num_splits=None"
)
PAGED_ATTENTION = """(Tensor! out, PARTIALTensor query, Tensor key_cache, Tensor value_cache, int num_kv_heads,
float scale, Tensor block_tables, Tensor seq_lens, int block_size, int max_seq_len, Tensor? alibi_slopes,
str kv_cache_dtype, Tensor k_scale, Tensor v_scale, int tp_rank, int blocksparse_local_blocks,
int blocksparse_vert_stride, int blocksparse_block_size, int blocksparse_head_sliding_step) -> ()"""

SHAPES = Shapes(heads=2, group=2)
LENGTHS, QUERIES = [300, 7, 64, 1], [20, 7, 1, 1]
CASES = pytest.mark.parametrize("queries", [None, QUERIES, [3] * 3 + [1]], ids=["decode", "prefill", "nearly equal"])


def keys(x, length, row=None, pages=None):
    """The first `length` tokens of a row, or of pages: [length, H, D] float64."""
    if pages is None:
        return x[row, :length].double()
    return x[pages[: -(-length // x.shape[1])].long()].flatten(0, 1)[:length].double()


def require_int32(*tensors):
    for x in tensors:
        assert x is None or (x.dtype == torch.int32 and x.stride(-1) == 1), x


@pytest.fixture
def operator():
    """Defines an operator that looks as a library's does, from its signature and a function on CPU tensors."""
    libraries = []

    def define(schema, function):
        name, number = schema.split("(")[0], len(libraries)
        library = torch.library.Library(f"kvarena_fake_{number}", "DEF")
        libraries.append(library)
        library.define(" ".join(schema.split()))
        library.impl(name, function, "CPU")
        return getattr(getattr(torch.ops, f"kvarena_fake_{number}"), name)

    yield define
    for library in libraries:
        library._destroy()


@pytest.fixture
def fa3_kernel(operator, monkeypatch):
    """FlashAttention 3 over the fake; `calls` collects what it was given."""
    calls = []

    def forward(q, k, v, *rest):
        names = [argument.name for argument in op.default._schema.arguments][3:]
        given = dict(zip(names, rest, strict=True))
        calls.append(given | {"k": k})
        table, rows, lengths, starts = (
            given[name] for name in ("page_table", "kv_batch_idx", "seqused_k", "cu_seqlens_q")
        )
        require_int32(table, rows, lengths, starts)
        assert given["is_causal"]
        assert given["window_size_left"] == given["window_size_right"] == -1
        assert given["softmax_scale"] == pytest.approx(q.shape[-1] ** -0.5)
        assert max(lengths.tolist()) <= given["max_seqlen_k"]
        assert len(starts) == len(lengths) + 1 == len(table if rows is None else rows) + 1
        for b, length in enumerate(lengths.tolist()):
            where = {"row": rows[b]} if table is None else {"pages": table[b]}
            run = slice(starts[b], starts[b + 1])
            given["out"][run] = attend_sequence(q[run].double(), *(keys(x, length, **where) for x in (k, v)))
        return [given["out"].clone()]

    op = operator(FA3_FORWARD, forward)
    monkeypatch.setattr(fa3, "load_operators", lambda *_: SimpleNamespace(fwd=op))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    kernel = fa3.FA3Attention()
    kernel.calls = calls
    return kernel


def kvcache(q, k, v, lengths, rows, table, out, causal):
    """What FlashAttention 2 computes over a KV cache."""
    require_int32(lengths, rows, table)
    assert causal
    assert rows is None or rows.is_contiguous()
    assert len(q) == len(lengths) == len(table if rows is None else rows)
    for b, length in enumerate(lengths.tolist()):
        where = {"row": rows[b]} if table is None else {"pages": table[b]}
        out[b] = attend_sequence(q[b].double(), *(keys(x, length, **where) for x in (k, v)))
    return out


@pytest.fixture(params=["out", "its own"])
def fa2_kernel(operator, monkeypatch, request):
    """FlashAttention 2 over the fake, which returns `out` or a tensor of its own."""

    def forward(q, kcache, vcache, *rest):
        names = [argument.name for argument in op.default._schema.arguments][3:]
        given = dict(zip(names, rest, strict=True))
        assert given["softmax_scale"] == pytest.approx(q.shape[-1] ** -0.5)
        out = given["out"] if request.param == "out" else torch.empty_like(q)
        where = (given[name] for name in ("seqlens_k", "cache_batch_idx", "block_table"))
        return [kvcache(q, kcache, vcache, *where, out, given["is_causal"])]

    op = operator(FA2_FORWARD, forward)
    monkeypatch.setattr(fa2, "load_operators", lambda *_: SimpleNamespace(fwd_kvcache=op))
    return fa2.FA2Attention()


@pytest.fixture
def flash_attn_kernel(monkeypatch):
    """The flash-attn distribution, faked as a module."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        assert block_table is None or k_cache.shape[1] % 256 == 0
        out = torch.empty_like(q)
        return kvcache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table, out, causal)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return FlashAttnAttention()


def torch_kernel(operator, monkeypatch, schema):
    """torch's own flash attention, over a fake of one release's operator."""

    def forward(q, k, v, starts, k_starts, max_q, max_k, dropout, causal, debug, *, scale, seqused_k, **new):
        table = new.get("block_table")
        require_int32(starts, k_starts, seqused_k, table)
        assert table is None or (k.shape[1] % 256 == 0 and new["num_splits"] == 1)
        assert causal
        assert not debug
        assert dropout == 0
        assert k_starts.shape == starts.shape
        out = torch.empty_like(q)
        for b, length in enumerate(seqused_k.tolist()):
            pages = None if table is None else table[b]
            run = slice(starts[b], starts[b + 1])
            if pages is None:
                k_b, v_b = (x[k_starts[b] : k_starts[b] + length].double() for x in (k, v))
            else:
                k_b, v_b = (keys(x, length, pages=pages) for x in (k, v))
            out[run] = attend_sequence(q[run].double(), k_b, v_b)
        return out, *(torch.empty(0) for _ in range(4))

    monkeypatch.setattr(torch_flash, "_forward", operator(schema, forward))
    return torch_flash.TorchFlashAttention()


def assert_right(out, batch):
    torch.testing.assert_close(out.double(), reference_attention(*batch), atol=1e-5, rtol=1e-5)


@CASES
def test_fa3_reads_every_arrangement(arrangement, queries, arrange, run, fa3_kernel):
    batch = arrange(arrangement, SHAPES, LENGTHS, queries)
    assert_right(run(fa3_kernel, batch), batch)


def test_fa3_is_told_of_no_more_than_the_longest_sequence(arrange, run, fa3_kernel):
    """The number of splits follows from the capacity that the library sees."""
    for name in ("rows", "scattered blocks"):
        batch = arrange(name, SHAPES, LENGTHS)
        short = replace(batch.view, lengths=batch.view.lengths.clamp(max=100), max_length=100)
        run(fa3_kernel, batch._replace(view=short))
    rows, blocks = fa3_kernel.calls
    assert rows["k"].shape[1] == 100
    assert blocks["page_table"].shape[1] == -(-100 // 16)


def test_fa3_wants_hopper(operator, monkeypatch, fa3_kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"Hopper.*8\.0"):
        fa3.FA3Attention()


@CASES
def test_fa2_reads_every_arrangement(arrangement, queries, arrange, run, fa2_kernel):
    batch = arrange(arrangement, SHAPES, LENGTHS, queries)
    assert_right(run(fa2_kernel, batch), batch)


def test_fa2_prefills_equal_runs_in_one_call(arrange, run, fa2_kernel, monkeypatch):
    calls = []
    inner = fa2_kernel.call
    monkeypatch.setattr(fa2_kernel, "call", lambda *given: calls.append(given) or inner(*given))
    batch = arrange("scattered blocks", SHAPES, [40, 7], [5, 5])
    assert_right(run(fa2_kernel, batch), batch)
    assert len(calls) == 1


@CASES
def test_flash_attn_reads_every_arrangement(arrangement, queries, arrange, run, flash_attn_kernel):
    batch = arrange(arrangement, SHAPES, LENGTHS, queries, block_size=256)
    assert_right(run(flash_attn_kernel, batch), batch)


@CASES
def test_torch_flash_reads_every_arrangement(arrangement, queries, arrange, run, operator, monkeypatch):
    kernel = torch_kernel(operator, monkeypatch, TORCH_2_13)
    batch = arrange(arrangement, SHAPES, LENGTHS, queries, block_size=256)
    if arrangement == "padded rows":
        with pytest.raises(UserError, match="whole tokens"):
            run(kernel, batch)
    else:
        assert_right(run(kernel, batch), batch)


def test_torch_flash_of_2_11_is_asked_for_rows_alone(arrange, run, operator, monkeypatch):
    kernel = torch_kernel(operator, monkeypatch, TORCH_2_11)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", torch_flash._forward)
    assert_right(run(kernel, arrange("rows", SHAPES, LENGTHS)), arrange("rows", SHAPES, LENGTHS))
    asked = [fits(kernel.spec, layout, "cuda", "float16", 64, 256) for layout in (Layout.CONTIGUOUS, Layout.PAGED)]
    assert asked[0] is None
    assert "takes no block tables" in asked[1]
    assert fits(kernel.spec, Layout.PAGED) is None  # of a modelled clock, or the matrix: no torch is asked
    monkeypatch.undo()
    assert fits(kernel.spec, Layout.PAGED, "cuda") is None  # this torch has them


def test_torch_flash_knows_this_torch():
    """The operator that the adapter calls has the arguments it names."""
    names = {argument.name for argument in torch_flash._forward.default._schema.arguments}
    assert {"scale", "seqused_k"} <= names


def paged_attention(calls, version):
    """PagedAttention over its own layout: keys [N, H, D / x, P, x], values [N, H, D, P]."""

    def forward(out, *rest):
        query, key_cache, value_cache, _, scale, tables, lengths, block_size, max_length = rest[-18:-9]
        calls.append(version)
        require_int32(tables, lengths)
        n, heads, groups, size, x = key_cache.shape
        assert key_cache.is_contiguous()
        assert x * key_cache.element_size() == 16
        assert value_cache.shape == (n, heads, groups * x, size)
        assert block_size == size
        assert max_length == max(lengths)
        assert scale == pytest.approx(query.shape[-1] ** -0.5)
        k = key_cache.permute(0, 3, 1, 2, 4).reshape(n, size, heads, groups * x)
        for b, length in enumerate(lengths.tolist()):
            both = (keys(x, length, pages=tables[b]) for x in (k, value_cache.permute(0, 3, 1, 2)))
            out[b] = attend_sequence(query[b : b + 1].double(), *both)[0]

    return forward


@pytest.mark.parametrize("longest", [300, 600], ids=["v1", "v2"])
def test_vllm_paged_converts_blocks(longest, arrange, run, operator, monkeypatch):
    calls = []
    partial = "Tensor! exp_sums, Tensor! max_logits, Tensor! tmp_out, "
    entries = {
        "paged_attention_v1": operator("v1" + PAGED_ATTENTION.replace("PARTIAL", ""), paged_attention(calls, 1)),
        "paged_attention_v2": operator("v2" + PAGED_ATTENTION.replace("PARTIAL", partial), paged_attention(calls, 2)),
    }
    monkeypatch.setattr(vllm_paged, "load_operators", lambda *_: SimpleNamespace(**entries))
    batch = arrange("scattered blocks", SHAPES, [longest, 7, 64])
    assert_right(run(vllm_paged.VLLMPagedAttention(), batch), batch)
    assert calls == [1 if longest == 300 else 2]


GPU_KERNELS = [name for name, (spec, *_) in CATALOGUE.items() if spec.devices == {"cuda"}]


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_gpu_kernels_are_refused_on_a_cpu(name):
    spec = kernel_spec(name)
    assert "runs on cuda, not cpu" in fits(spec, min(spec.layouts), device="cpu")


@pytest.mark.parametrize("name", [name for name in GPU_KERNELS if kernel_spec(name).requires])
def test_what_is_absent_comes_with_a_hint(name, monkeypatch):
    monkeypatch.setattr("kvarena.kernels.registry.find_spec", lambda _: None)
    monkeypatch.delenv(kernel_spec(name).library_variable, raising=False)
    with pytest.raises(UserError, match=rf"kernel={name}: needs .*, not installed; .+"):
        get_kernel(name)


def test_block_sizes_are_the_libraries():
    assert fits(kernel_spec("flash_attn"), Layout.PAGED, block_size=16) == "block sizes 256, not 16"
    assert fits(kernel_spec("fa2"), Layout.PAGED, block_size=16) is None
    assert fits(kernel_spec("fa3"), Layout.PAGED, block_size=1) is None
    assert fits(kernel_spec("vllm_paged"), Layout.CONTIGUOUS) == "reads paged, not contiguous"


def test_a_library_may_be_named(monkeypatch, tmp_path):
    """A file in the environment stands in for the whole of vLLM."""
    monkeypatch.setattr("kvarena.kernels.registry.find_spec", lambda _: None)
    monkeypatch.setenv("KVARENA_FA3_SO", str(tmp_path / "fa3.so"))
    assert missing(kernel_spec("fa3")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"KVARENA_FA3_SO has no .*fa3\.so"):
        get_kernel("fa3")
    (tmp_path / "fa3.so").write_text("no library")
    with pytest.raises(UserError, match="cannot load"):
        get_kernel("fa3")


def test_an_installed_vllm_without_the_library_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("KVARENA_FA3_SO", raising=False)
    monkeypatch.setattr(
        vllm_library, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    with pytest.raises(UserError, match="the installed vllm has no"):
        vllm_library.library_path(kernel_spec("fa3"), fa3.LIBRARY)


def test_libraries_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        vllm_library.load_operators(kernel_spec("fa3"), "_vllm_fa3_C", fa3.LIBRARY)

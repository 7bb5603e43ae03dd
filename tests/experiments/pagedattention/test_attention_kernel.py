"""Fig 18a: the same bytes under every arrangement, wrong kernels noticed, rows for every kernel that fits."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import torch

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.attention_time import WorkingSet, seconds_per_call
from kvarena.experiments.pagedattention.attention_kernel import FIGURE, HEADLINE, Line
from kvarena.harness.model import load_preset
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.run.published import is_earned, named
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import get_kernel, kernel_spec

CPU = torch.device("cpu")
ROWS, IN_ORDER, SCATTERED = Arrangement(None), Arrangement(16), Arrangement(16, scattered=True)
SMALL = (
    "experiment=attention_kernel", "device=cpu", "model=tiny-llama", "params.batch_sizes=[1,3]",
    "params.contexts=[24,64]", "params.block_sizes=[1,16,64]", "params.working_set_bytes=100000", "params.rounds=6",
)  # fmt: skip


@pytest.fixture
def working_set() -> WorkingSet:
    run = compose_run(*SMALL)
    return WorkingSet(run.model, batch=3, context=24, num_bytes=100_000, device=CPU)


def test_the_set_is_as_large_as_asked_and_counts_what_a_call_reads(working_set: WorkingSet) -> None:
    head_bytes = 4 * compose_run(*SMALL).model.num_kv_heads * compose_run(*SMALL).model.head_size
    assert working_set.bytes_per_call == 2 * 3 * 24 * head_bytes
    assert working_set.num_batches * 2 * 3 * 32 * head_bytes >= 100_000, "rows of 32 tokens"


class Recording(AttentionKernel):
    """Keeps what it was asked, and computes nothing."""

    spec = kernel_spec("numba")

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel, self.seen = kernel, []

    def decode(self, q, cache, view, out):
        self.kernel.decode(q, cache, view, out)
        self.seen.append((cache, view, out.clone()))

    prefill = decode


def test_rows_and_blocks_in_order_are_the_same_bytes(working_set: WorkingSet) -> None:
    outputs = {}
    for arrangement in (ROWS, IN_ORDER, SCATTERED):
        kernel = Recording(get_kernel("numba"))
        for call in working_set.calls(kernel, arrangement):
            call()
        outputs[arrangement] = torch.stack([out for _, _, out in kernel.seen])
        assert len(kernel.seen) == working_set.num_batches + 1, "one more for the check"
        assert len({cache.k.data_ptr() for cache, _, _ in kernel.seen}) == 1
    assert torch.equal(outputs[ROWS], outputs[IN_ORDER]), "one body: bit for bit"
    assert not torch.equal(outputs[ROWS], outputs[SCATTERED]), "other blocks, other tokens"


def test_scattered_tables_give_every_block_to_one_sequence(working_set: WorkingSet) -> None:
    kernel = Recording(get_kernel("numba"))
    for call in working_set.calls(kernel, SCATTERED):
        call()
    tables = torch.cat([view.block_table.flatten() for _, view, _ in kernel.seen[1:]])
    assert len(tables.unique()) == len(tables)
    assert (tables.diff() != 1).any()


def test_a_kernel_that_computes_something_else_is_not_timed(working_set: WorkingSet) -> None:
    class Wrong(AttentionKernel):
        spec = kernel_spec("numba")

        def decode(self, q, cache, view, out):
            out.zero_()

        prefill = decode

    with pytest.raises(RuntimeError, match="off by"):
        working_set.calls(Wrong(), ROWS)


def test_a_sample_is_the_mean_over_all_calls() -> None:
    made = []
    measure = seconds_per_call([lambda: made.append(1)] * 5, CPU, in_graph=False)
    assert len(made) == 5, "compiled and touched before anything is timed"
    assert measure() > 0
    assert len(made) == 10


def test_every_kernel_that_fits_has_rows(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("attention_kernel", *SMALL[1:])
    rows = summary[summary.quantity == HEADLINE]
    assert set(rows.paper) == {"kvarena"}, "a CPU earns no GPU's name"
    assert set(rows.system) == {
        "static/numba", "paged/numba", "paged-in-order/numba", "static/sdpa", "paged/gather_sdpa",
        "paged-in-order/gather_sdpa",
    }  # fmt: skip
    assert set(rows.panel) == {"tiny-llama, bs1, 1 x cpu", "tiny-llama, bs3, 1 x cpu"}
    assert set(rows.x) == {24, 64}
    assert (rows.n == 6).all()
    assert (rows.value > 0).all()
    ratios = summary[summary.quantity == "time_over_contiguous_vs_context"]
    assert set(ratios.kernel) == {"numba"}, "only one body isolates the layout"
    by_block = summary[summary.quantity == "time_over_block_16_vs_block_size"].set_index("x").value
    assert by_block[16] == 1
    assert set(by_block.index) == {1, 16, 64}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.batch_sizes=[]", "at least one"),
        ("params.contexts=[0]", "at least 1"),
        ("params.block_sizes=[1]", "16 among them"),
        ("params.block_sizes=[16,24]", "powers of two"),
        ("params.block_sizes=[16,128]", "none longer"),
        ("params.rounds=0", "at least 1"),
        ("params.kernels=[triton]", "triton"),
        ("params.kernels=[nothing]", "no such kernel"),
        ("params.kernels=[]", "params.kernels"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of("attention_kernel", *SMALL[1:], override)


def test_no_row_is_modelled() -> None:
    with pytest.raises(UserError, match="no modelled form"):
        compose_run(*[s for s in SMALL if not s.startswith("device")], "clock=modelled")


def test_kernels_of_one_layout_are_compared_without_block_sizes(summary_of: Callable[..., pd.DataFrame]) -> None:
    quick = [each for each in SMALL[1:] if "block_sizes" not in each]
    summary = summary_of("attention_kernel", *quick, "params.kernels=[sdpa]", "params.batch_sizes=[1]")
    assert set(summary.label) == {"static/sdpa"}


@pytest.fixture
def on_the_papers_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    paper = ("model=opt-13b", "params.working_set_bytes=1073741824", "params.kernels=[sdpa]")
    run = compose_run("experiment=attention_kernel", "device=cpu", *paper)
    return replace(run, device=DeviceConfig(name="cuda", kind="cuda"))


def earned(run, line: Line, batch: int = 8) -> bool:
    return is_earned(named(run, line.system, FIGURE, key="vLLM", batch=batch, tables=line.tables, x=64))


def test_vllms_line_is_vllms_kernel_as_the_paper_ran_it(on_the_papers_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    run, line = on_the_papers_gpu, Line("vllm_paged", SCATTERED)
    names = named(run, line.system, FIGURE, key="vLLM", batch=32, tables="scattered", x=64)
    assert [names[key] for key in ("paper", "figure", "panel", "system")] == [
        "pagedattention",
        "fig18a",
        "bs32",
        "vLLM",
    ]
    assert earned(run, line)
    for other in (Line("triton", SCATTERED), Line("triton", ROWS), Line("vllm_paged", IN_ORDER)):
        assert not earned(run, other), other
    assert not earned(run, line, batch=16)
    for changed in (
        {"model": load_preset("opt-13b", dtype="bfloat16")},
        {"model": load_preset("opt-66b")},
        {"params": replace(run.params, working_set_bytes=1)},
    ):
        assert not earned(replace(run, **changed), line), changed
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert not earned(run, line)

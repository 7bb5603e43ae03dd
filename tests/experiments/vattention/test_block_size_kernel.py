"""Fig 3: the same bytes for every block size; the published protocol's grow with it."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import torch

from kvarena.errors import UserError
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.kernel_pairs import allocator_named, kernel_over
from kvarena.experiments.vattention.block_size_kernel import FIGURE, HEADLINE
from kvarena.experiments.vattention.random_blocks import DrawnBlocks
from kvarena.harness.model import load_preset
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.record.record import Outcome, Recorder
from kvarena.harness.run.published import is_earned, named
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import get_kernel, kernel_spec

SMALL = (
    "experiment=block_size_kernel", "device=cpu", "model=tiny-llama", "params.batch_sizes=[1,3]", "params.context=64",
    "params.block_sizes=[16,64]", "params.working_set_bytes=100000", "params.drawn_blocks=8", "params.rounds=6",
    "params.kernels=[numba,gather_sdpa]",
)  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = compose_run(*SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARENA_RUNS", str(tmp_path_factory.mktemp("runs")))
        return carry_out(run, Recorder(run.experiment, run.plain()))


@pytest.fixture(scope="module")
def summary(outcome: Outcome) -> pd.DataFrame:
    return outcome.summary


def test_every_size_is_compared_with_blocks_of_16(outcome: Outcome, summary: pd.DataFrame) -> None:
    ratios = summary[summary.quantity == HEADLINE]
    assert set(ratios.paper) == {"kvarena"}
    assert set(ratios.panel) == {
        f"tiny-llama, 64 tokens, {tables}, 1 x cpu" for tables in ("in order", "shuffled", "drawn")
    }
    assert set(ratios.system) == {"block 64/numba", "block 64/gather_sdpa"}
    assert set(ratios.x) == {1, 3}
    assert (ratios.n == 6).all()
    times = outcome.measured.frames["samples"].pivot_table(
        "call_s", ["tables", "kernel", "batch", "round"], "block_size"
    )
    of_rounds = (times[64] / times[16]).groupby(["tables", "kernel", "batch"]).median()
    for _, row in ratios.iterrows():
        assert row.value == pytest.approx(of_rounds[row.panel.split(", ")[2], row.kernel, row.x]), "pairs of one round"


def test_the_working_set_depends_on_the_block_as_published_alone(summary: pd.DataFrame) -> None:
    touched = summary[(summary.quantity == "working_set_vs_batch") & (summary.kernel == "numba") & (summary.x == 3)]
    touched = touched.assign(tables=touched.panel.str.split(", ").str[2]).set_index(["tables", "system"]).value
    for tables in ("in order", "shuffled"):
        assert touched[tables, "block 16/numba"] == touched[tables, "block 64/numba"] >= 100_000
    assert touched["drawn", "block 64/numba"] > touched["drawn", "block 16/numba"]


def test_drawn_tables_repeat_blocks_and_count_each_once() -> None:
    model = compose_run(*SMALL).model
    drawn = DrawnBlocks(model, batch=4, context=64, block_size=16, num_blocks=4, device=torch.device("cpu"))
    [call] = drawn.calls(get_kernel("numba"))
    call()
    block_bytes = 2 * 16 * model.num_kv_heads * model.head_size * 4
    assert drawn.distinct_bytes == 4 * block_bytes, "16 draws of 4 blocks find them all"


def test_a_kernel_that_computes_something_else_is_not_timed() -> None:
    class Wrong(AttentionKernel):
        spec = kernel_spec("numba")

        def decode(self, q, cache, view, out):
            out.zero_()

        prefill = decode

    drawn = DrawnBlocks(compose_run(*SMALL).model, 1, 64, 16, 4, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="off by"):
        drawn.calls(Wrong())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.block_sizes=[32]", "16 among them"),
        ("params.block_sizes=[16,48]", "powers of two"),
        ("params.block_sizes=[16,128]", "none longer"),
        ("params.batch_sizes=[]", "at least 1"),
        ("params.rounds=0", "at least 1"),
        ("params.kernels=[sdpa]", "sdpa"),
        ("params.kernels=[]", "params.kernels"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of("block_size_kernel", *SMALL[1:], override)


def test_fig_3_is_vllms_kernel_over_drawn_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    sizes = ("model=llama-3-8b", "params.context=16384", "params.drawn_blocks=1024")
    run = compose_run("experiment=block_size_kernel", "device=cpu", *sizes)
    run = replace(run, device=DeviceConfig(name="cuda", kind="cuda"))

    def names(run, kernel="vllm_paged", size=32, tables="drawn"):
        system = kernel_over(allocator_named("paged"), kernel)
        return named(run, system, FIGURE, key=f"block {size}", tables=tables, x=1)

    assert [names(run)[key] for key in ("paper", "panel", "system")] == ["vattention", "Llama-3-8B 16K", "block 32"]
    for other in (
        names(run, kernel="triton"), names(run, size=16), names(run, tables="shuffled"),
        names(replace(run, model=load_preset("yi-6b"))), names(replace(run, model=load_preset("llama-3-8b", tp=2))),
        names(replace(run, params=replace(run.params, context=8192))),
        names(replace(run, params=replace(run.params, drawn_blocks=512))),
    ):  # fmt: skip
        assert not is_earned(other)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert not is_earned(names(run))

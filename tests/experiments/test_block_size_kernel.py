"""Fig 3: the same bytes for every block size; the published protocol's grow with it."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from kvarena.errors import UserError
from kvarena.experiments.compose import compose_run
from kvarena.experiments.drawn_blocks import DrawnBlocks
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import get_kernel, kernel_spec

SMALL = (
    "experiment=block_size_kernel", "device=cpu", "model=tiny-llama", "params.batch_sizes=[1,3]", "params.context=64",
    "params.block_sizes=[16,64]", "params.working_set_bytes=100000", "params.drawn_blocks=8", "params.rounds=6",
    "params.kernels=[numba,gather_sdpa]",
)  # fmt: skip


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    from kvarena.experiments import block_size_kernel
    from kvarena.harness.record import Recorder

    run = compose_run(*SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARENA_RUNS", str(tmp_path_factory.mktemp("runs")))
        return block_size_kernel.run(run, Recorder(run.experiment, run.plain())).summary


def test_every_size_is_compared_with_blocks_of_16(summary: pd.DataFrame) -> None:
    ratios = summary[summary.figure == "fig3"]
    assert set(ratios.panel) == {f"tiny-llama 64 tokens, {tables}" for tables in ("in order", "shuffled", "drawn")}
    assert set(ratios.system) == {"block 64/numba", "block 64/gather_sdpa"}
    assert set(ratios.x) == {1, 3}
    assert (ratios.n == 6).all()
    times = summary[summary.quantity == "decode_kernel_time_vs_batch"].set_index(["panel", "kernel", "x", "system"])
    for key, value in ratios.set_index(["panel", "kernel", "x"]).value.items():
        over = times.value[(*key, f"block 64/{key[1]}")] / times.value[(*key, f"block 16/{key[1]}")]
        assert value == pytest.approx(over, rel=1), "of the same order: medians of ratios and of times differ"


def test_the_working_set_depends_on_the_block_as_published_alone(summary: pd.DataFrame) -> None:
    touched = summary[(summary.quantity == "working_set_vs_batch") & (summary.kernel == "numba") & (summary.x == 3)]
    touched = touched.assign(tables=touched.panel.str.split(", ").str[1]).set_index(["tables", "system"]).value
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
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of("block_size_kernel", *SMALL[1:], override)

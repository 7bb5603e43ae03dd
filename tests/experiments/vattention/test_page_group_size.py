"""Tables 8 and 10, Figs 14 and 15: arithmetic against the published, kernels over both sizes, the largest batch."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from kvarena.allocators.sizes import KB, MB
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.vattention import page_group_batch, page_group_kernels
from kvarena.experiments.vattention.page_group_kernels import MappedRows, Point
from kvarena.experiments.vattention.page_group_tables import token_rows
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import beside_published, frame, read_published
from kvarena.harness.run.published import named
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import kernel_spec

SMALL = (
    "page_group_size", "device=cpu", "model=tiny-llama", "arrival.duration_s=0.3", "params.kernels=[numba]",
    "params.prefill_contexts=[64]", "params.decode_context=64", "params.decode_batches=[1,2]", "params.rounds=6",
    "params.page_groups=[64KB,256KB]", "params.pool_bytes=8388608",
)  # fmt: skip
MODELLED = (
    "page_group_size", "clock=modelled", "params.gpus={yi-6b: 1}", "params.seeds=[0]", "arrival.duration_s=60",
    "params.page_groups=[2MB,64KB]",
)  # fmt: skip


def test_tokens_are_those_of_the_published_tables_but_for_the_misprint() -> None:
    table = frame(token_rows(compose_run("experiment=page_group_size", "clock=modelled", "device=h200", "engine=lean")))
    both = beside_published(table, read_published(PUBLISHED))
    assert both.published.notna().all(), "arithmetic on the models: no device and no engine decides"
    assert set(both.evidence) == {"exact"}
    assert len(both) == 6 * (4 + 2)
    apart = both[both.value != both.published].set_index("panel")
    assert apart.value.to_dict() == {"Yi-34B TP-1": 17, "Yi-34B TP-2": 34}
    assert apart.published.to_dict() == {"Yi-34B TP-1": 18, "Yi-34B TP-2": 36}
    assert set(apart.system) == {"2MB sliced"}


def test_the_same_values_lie_behind_page_groups_of_either_size() -> None:
    model = compose_run("experiment=page_group_size", "device=cpu", "model=tiny-llama").model
    rows = [MappedRows(model, 2, 100, size, torch.device("cpu")) for size in (64 * KB, 2 * MB)]
    try:
        small, large = (r.cache for r in rows)
        assert torch.equal(small.k, large.k)
        assert torch.equal(small.v, large.v)
        assert not torch.equal(small.k, small.v)
        assert small.k.stride(0) * 4 == 64 * KB
        assert large.k.stride(0) * 4 == 2 * MB
    finally:
        for r in rows:
            r.close()


def test_an_output_that_depends_on_the_page_group_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(AttentionKernel):
        spec = kernel_spec("numba")

        def decode(self, q, cache, view, out):
            out.fill_(cache.k.stride(0))

        prefill = decode

    monkeypatch.setattr(page_group_kernels, "get_kernel", lambda name: Odd())
    model = compose_run("experiment=page_group_size", "device=cpu", "model=tiny-llama").model
    with pytest.raises(RuntimeError, match="another output"):
        page_group_kernels.measure(model, "odd", [Point("decode", 1, 64)], [64 * KB, 2 * MB], 1, "cpu")


def test_kernels_are_timed_and_requests_counted(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*SMALL)
    kernels = summary[summary.quantity.str.startswith("kernel_time_")]
    assert set(zip(kernels.system, kernels.x, strict=True)) == {
        ("numba prefill", 64), ("numba decode 64", 1), ("numba decode 64", 2)
    }  # fmt: skip
    assert set(kernels.quantity) == {f"kernel_time_64KB_over_2MB_vs_{axis}" for axis in ("batch", "context")}
    assert (kernels.n == 6).all()
    assert set(kernels.setup) == {"tiny-llama, 1 x cpu"}, "kernels are served no requests"
    batch = summary[summary.quantity == "max_batch_vs_page_group"].set_index("system").value
    labels = ("vattention-64KB", "vattention-256KB", "vattention-sliced-256KB", "paged of 16")
    assert set(batch.index) == {f"{label}/numba" for label in labels}
    assert batch["vattention-64KB/numba"] >= batch["vattention-256KB/numba"] > 0
    assert set(summary[summary.paper == "vattention"].figure) == {"table8", "table10"}


def test_smaller_page_groups_let_more_requests_run(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*MODELLED)
    rows = summary[summary.quantity == "max_batch_vs_page_group"]
    batch = rows.set_index("label").value
    assert batch["vattention-64KB/fa2"] > 1.2 * batch["vattention-2MB/fa2"]
    assert batch["vattention-sliced-2MB/fa2"] > 1.2 * batch["vattention-2MB/fa2"]
    assert set(rows.evidence) == {"conditional"}
    assert set(rows.paper) == {"kvarena"}, "one seed and 60 s are not what is stated of Fig 15"
    assert not summary.quantity.str.startswith("kernel_time_").any(), "a device model knows nothing of it"


@pytest.mark.parametrize(
    ("changed", "figure"),
    [("", {"fig15"}), ("params.seeds=[0]", set()), ("arrival.rate=8", set()), ("model.dtype=float32", set()),
     ("model.tp=2", set()), ("device=h200 engine=lean", set()), ("params.pool_bytes=9000000000", set()),
     ("scheduler=sarathi", set()), ("trace.max_tokens=4096", set())],
)  # fmt: skip
def test_fig_15_is_earned_by_what_is_stated_of_it(changed: str, figure: set[str]) -> None:
    run = compose_run("experiment=page_group_size", "clock=modelled", "model=yi-6b", *changed.split())
    [one] = page_group_batch.served(run)
    rows = [named(one, v.listed, "fig15", key=v.unit, assuming="so") for v in page_group_batch.variants(run)]
    assert {row["figure"] for row in rows if row["paper"] == "vattention"} == figure
    earned = [row["system"] for row in rows if row["paper"] == "vattention"]
    assert earned == (["2MB", "256KB", "128KB", "64KB"] if figure else []), "neither sliced ones nor blocks"


def test_units_that_come_twice_run_once_and_are_called_what_they_are() -> None:
    both = "systems=[vattention-fa2,vattention-fa2-64kb,vattention-flashinfer]"
    units = page_group_batch.variants(compose_run("experiment=page_group_size", "clock=modelled", both))
    assert len(units) == 2 * 5, "four sizes and a sliced one, by two kernels"
    assert len({(v.system.shown_allocator, v.system.kernel.name) for v in units}) == len(units)
    for unit in units:
        assert unit.system.allocator.page_group in unit.system.shown_allocator


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.seeds=[]", "at least one seed"),
        ("params.compared=[2MB,64KB]", "the smaller first"),
        ("params.compared=[64KB]", "two page-groups"),
        ("params.kernels=[gather_sdpa]", "gather_sdpa"),
        ("params.rounds=0", "at least 1"),
        ("systems=[static-numba]", "no unit to change"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of(*SMALL, override)

"""Figs 14 to 17 on short traces: which order must come out, what is the paper's and what is ours, and refusals."""

from collections.abc import Callable
from types import ModuleType

import pandas as pd
import pytest

from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.pagedattention import beam_search, chatbot, parallel_sampling, shared_prefix
from kvarena.experiments.pagedattention.sharing_savings import savings
from kvarena.harness.run.published import differences

CROSSING, LATENCY = "rate_at_0.5_s_per_token", "normalized_latency_vs_rate"
SHORT = ("arrival.duration_s=60", "params.tolerance=0.2", "params.shares=[]")


def crossings(summary: pd.DataFrame, detail: str) -> pd.Series:
    """By allocator, of the setup in which this ran."""
    rows = summary[(summary.quantity == CROSSING) & summary.setup.str.contains(f", {detail}, 1 x ")]
    return rows.set_index("allocator").value


def test_parallel_sampling(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("parallel_sampling", "params.only=[fig14b]", "systems=[orca-pow2,orca-oracle,paged]", *SHORT)
    rates = crossings(summary, "parallel n=4")
    assert rates["orca_pow2"] < rates["orca_oracle"] < rates["paged"]
    assert set(summary.paper) == {"kvarena"}, "a minute is not Fig 14"
    assert set(summary.evidence) == {"predicted"}
    points = summary[(summary.quantity == LATENCY) & (summary.allocator == "paged")].sort_values("x")
    assert points.x.iloc[0] < rates["paged"] < points.x.iloc[-1]
    below = points[points.x < rates["paged"]]
    assert (below.value < 0.5).all()


def test_beams_are_conditional_and_their_band_is_ours(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("beam_search", "params.only=[fig14e]", "systems=[orca-oracle,paged]", *SHORT)
    rates = crossings(summary, "beam w=4")
    assert rates["orca_oracle"] < rates["paged"]
    assert set(summary.evidence) == {"conditional"}
    band = [crossings(summary, f"beam w=4, survival {survival}")["paged"] for survival in ("one", "all")]
    assert min(band) <= rates["paged"] * 1.01
    assert max(band) >= rates["paged"] * 0.99


def test_a_shared_prefix_helps_whoever_shares_it(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("shared_prefix", "systems=[orca-oracle,paged]", *SHORT)
    one, five = crossings(summary, "80 tokens shared"), crossings(summary, "336 tokens shared")
    assert one["orca_oracle"] < one["paged"]
    assert five["paged"] / five["orca_oracle"] > 1.3 * one["paged"] / one["orca_oracle"]
    assert set(summary.evidence) == {"conditional"}, "the engine's constants are OPT-13B's"


def test_a_chatbot_as_the_artifact_and_fair(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("chatbot", "systems=[orca-oracle,paged]", "arrival.duration_s=300", *SHORT[1:])
    theirs, fair = crossings(summary, "as_artifact"), crossings(summary, "fair")
    assert theirs["orca_oracle"] < theirs["paged"] == fair["paged"], "one replay serves both"


CURVES = {
    parallel_sampling: {f"fig14{f}": f"parallel n={n}" for f, n in zip("abc", (2, 4, 6), strict=True)},
    beam_search: {f"fig14{f}": f"beam w={n}" for f, n in zip("def", (2, 4, 6), strict=True)},
    shared_prefix: {"fig16a": "1-shot 80 tok", "fig16b": "5-shot 341 tok"},
    chatbot: {"fig17": "chatbot"},
}


def earned(module: ModuleType, *overrides: str) -> pd.DataFrame:
    """Names of every line of a run that stands for a published one."""
    run = compose_run(f"experiment={module.__name__.rpartition('.')[2]}", "clock=modelled", *overrides)
    names = pd.DataFrame([line.names(line.figure) for line in module._lines(run)])
    return names[names.paper == "pagedattention"]


@pytest.mark.parametrize("module", CURVES)
def test_by_default_every_published_system_is_the_papers(module: ModuleType) -> None:
    names = earned(module)
    assert dict(zip(names.figure, names.panel, strict=True)) == CURVES[module]
    theirs = {"Orca(Oracle)", "vLLM"} | (set() if module is shared_prefix else {"Orca(Max)", "Orca(Pow2)"})
    assert names.groupby("figure").system.agg(set).eq(theirs).all()
    conditional = module in (beam_search, shared_prefix)
    assert set(names.evidence) == {"conditional" if conditional else "predicted"}


@pytest.mark.parametrize(
    "override",
    [
        "engine=lean",
        "arrival.duration_s=60",
        "arrival.seed=1",
        "arrival=poisson",
        "trace.seed=1",
        "trace.filter=fits_context",
        "trace.max_tokens=1024",
        "params.pool_bytes=1000000000",
        "params.tolerance=0.1",
        "params.stride=2",
        "scheduler.token_budget=2300",
    ],
)
@pytest.mark.parametrize("module", CURVES)
def test_whatever_changes_a_point_takes_its_name(module: ModuleType, override: str) -> None:
    if module is chatbot and override.startswith("trace.filter"):
        override = "trace.cut_prompt=512"
    if module is shared_prefix and override.startswith(("trace.filter", "trace.seed")):
        override = (
            "params.only=[fig16b] params.panels={fig16b: {trace: wmt16_5shot, prefix_tokens: 320, guess: {others: 1}}}"
        )
    assert earned(module, *override.split(" ", 1) if "only" in override else [override]).empty


def test_another_number_of_samples_or_order_of_conversations_is_ours() -> None:
    assert earned(parallel_sampling, "params.panels={fig14a: {n: 3, guess: {others: 1}}}").empty
    assert earned(beam_search, "params.panels={fig14d: {n: 3, guess: {others: 1}}}").empty
    assert earned(chatbot, "params.new_conversation.as_artifact.orca=0.2").empty


def test_the_figures_window_and_load_make_the_saving_the_papers() -> None:
    run = compose_run("experiment=sharing_savings", "clock=modelled")
    for way in ("parallel", "beam"):
        assert differences(run, "fig15", way, decoding=way, survival="neutral") == []
        assert differences(run, "fig15", way, decoding=way, survival="one") == ["survival"]
    other = compose_run("experiment=sharing_savings", "clock=modelled", "arrival.rate=10", "params.window_s=[5,20]")
    assert differences(other, "fig15", "beam", decoding="beam", survival="neutral") == [
        "arrival.rate",
        "params.window_s",
    ]


def test_savings_grow_with_n_and_beams_save_more(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "sharing_savings", "arrival.duration_s=20", "arrival.rate=10", "params.window_s=[5,20]", "params.n=[2,6]",
        "systems=[paged,vattention-2mb]",
    )  # fmt: skip
    way = summary.setup.str.extract(r"opt-13b alpaca, (.*), 1 x a100-40gb")[0]
    saving = summary.assign(way=way)[summary.quantity == "memory_saving_vs_n"].set_index(["way", "label", "x"]).value
    blocks, groups = "paged/vllm2023", "vattention-2MB/vllm2023"
    assert 0 < saving["parallel", blocks, 2] < saving["parallel", blocks, 6]
    for n in (2, 6):
        assert saving["parallel", blocks, n] < saving["beam", blocks, n]
        assert saving["beam, survival all", blocks, n] < saving["beam", blocks, n]
        assert saving["beam", blocks, n] < saving["beam, survival one", blocks, n]
        assert saving["parallel", groups, n] < saving["parallel", blocks, n], (
            "205 tokens of a page-group are more than most prompts"
        )


def test_the_papers_saving_is_a_ratio_of_means_upside_down() -> None:
    """Two iterations that hold 10 and share 10, six that hold 30 and share nothing; two of a free pool."""
    rows = [(2, 10, 10, 2), (6, 30, 0, 3), (2, 0, 0, 0)]  # iterations, held, shared, sequences
    steps = pd.DataFrame(
        [
            {**dict.fromkeys(Usage._fields, 0), "live": held * n, "free": 7 * n, "shared_bytes": shared * n, "steps": n,
             "decodes": sequences, "prefills": 0}
            for n, held, shared, sequences in rows
        ]
    )  # fmt: skip
    found = savings(steps)
    assert found["saving"] == pytest.approx(100 * (1 - 1 / ((2 * 2 + 6 * 1) / 8)))
    assert found["physical_gb"] == pytest.approx((2 * 10 + 6 * 30) / 8 / 1e9)
    assert found["logical_gb"] == pytest.approx((2 * 20 + 6 * 30) / 8 / 1e9)
    assert found["batched_sequences"] == pytest.approx((2 * 2 + 6 * 3) / 8)


@pytest.mark.parametrize(
    ("experiment", "override", "reason"),
    [
        ("chatbot", "~params.new_conversation", "no key can be taken away"),
        ("chatbot", "params.new_conversation=null", "params.new_conversation=.*: must be a mapping"),
        ("parallel_sampling", "params.panels={fig14a: {n: 0, guess: {others: 1}}}", "at least 1"),
        ("parallel_sampling", "params.panels={fig14a: {n: 2}}", r"params\.guess"),
        ("shared_prefix", "params.panels={a: {trace: alpaca, prefix_tokens: 80, guess: {others: 1}}}",
         "does not reach past its prefix"),
        ("parallel_sampling", "params.panels={a: {n: 2, guess: {others: 1}}, b: {n: 2, guess: {others: 1}}}",
         "one and the same curve"),
        ("sharing_savings", "params.n=[2, 2]", "nothing twice"),
        ("parallel_sampling", "params.only=[fig99]", "'fig99'.*fig14"),
        ("beam_search", "params.only=[fig99]", "'fig99'.*fig14"),
        ("shared_prefix", "params.only=[fig99]", "'fig99'.*fig16a, fig16b"),
    ],
)  # fmt: skip
def test_refusals(finished: Callable, experiment: str, override: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        finished(experiment, override, "systems=[paged]")

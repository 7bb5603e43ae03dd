"""A published name is earned by what ran: whatever defines the published point and differs un-earns it."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.seeds import seeded
from kvarena.harness.config import load, names
from kvarena.harness.engine.serving import Serving
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import read_published
from kvarena.harness.run.published import OURS, differences, is_earned, named
from kvarena.harness.run.run import Run

WASTE = "experiment=memory_waste"
PANEL = "OPT-13B ShareGPT"


def names_of(run: Run, system: int = 0, figure: str | None = "fig2") -> dict[str, object]:
    return named(seeded(run, 0), run.systems[system], figure)


def test_the_default_run_earns_the_names_of_fig_2() -> None:
    run = compose_run(WASTE)
    published = {str(names["system"]) for s in range(len(run.systems)) if is_earned(names := names_of(run, s))}
    assert published == {"Orca(Max)", "Orca(Pow2)", "Orca(Oracle)", "vLLM"}
    row = names_of(run)
    assert (row["paper"], row["figure"], row["panel"], row["evidence"]) == (
        "pagedattention",
        "fig2",
        PANEL,
        "calibrated",
    )
    assert (row["setup"], row["label"]) == ("opt-13b sharegpt, 1 x a100-40gb", "orca_max/vllm2023")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=float32", "engine=lean"],
        ["model.tp=4", "engine=lean"],
        ["model=llama-13b"],
        ["device=h200", "engine=lean"],
        ["engine=vllm2023_folded"],
        ["trace=alpaca"],
        ["trace.table=alpaca"],
        ["trace.filter=vllm"],
        ["trace.max_tokens=512"],
        ["trace.num_requests=40"],
        ["arrival=poisson", "arrival.duration_s=900"],
        ["arrival.rate=2"],
        ["arrival.duration_s=600"],
        ["arrival.quantum_s=0.1"],
        ["params.window_s=[0,900]"],
        ["params.pool_bytes=12897484800"],
        ["allocator=orca_max", "allocator.block_size=32"],
        ["scheduler.max_seqs=64"],
        ["decoding=parallel", "decoding.n=2"],
    ],
    ids=" ".join,
)
def test_whatever_differs_un_earns_them(overrides: list[str]) -> None:
    row = names_of(compose_run(WASTE, *overrides))
    assert row["paper"] == OURS
    assert (row["figure"], row["panel"], row["system"]) == ("memory_waste", row["setup"], row["label"])
    assert row["evidence"] != "calibrated"


def test_a_file_of_ones_own_earns_nothing_and_says_its_name(tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("prompt_tokens,output_tokens\n" + "100,50\n" * 40)
    row = names_of(compose_run(WASTE, f"trace.path={own}"))
    assert (row["paper"], row["panel"]) == (OURS, "opt-13b own.csv, 1 x a100-40gb")


def test_of_two_names_for_one_system_the_first_earns_the_published_one() -> None:
    run = compose_run(WASTE, "systems=[paged,paged-numba]")
    assert [is_earned(names_of(run, s)) for s in range(2)] == [True, False]


def test_no_paper_had_cuda_graphs() -> None:
    run = compose_run(WASTE)
    graphs = replace(run, clock="measured", engine=replace(run.engine, cuda_graphs=True))
    assert "engine.cuda_graphs" in differences(graphs, "fig2", PANEL)
    assert "engine.cuda_graphs" not in differences(replace(run, clock="measured"), "fig2", PANEL)


def test_another_seed_is_another_point() -> None:
    run = compose_run(WASTE)
    assert not is_earned(named(seeded(run, 1), run.systems[0], "fig2"))
    assert differences(seeded(run, 1), "fig2", PANEL) == ["trace", "arrival.seed"]


@pytest.mark.parametrize("experiment", [e for e in names("experiment") if "cpu" in load("experiment", e).profiles])
def test_what_is_measured_on_a_cpu_is_of_no_published_device(experiment: str) -> None:
    """Whatever else agrees: the device alone un-earns the name."""
    run = compose_run(f"experiment={experiment}", "clock=measured", "device=cpu")
    stated = [
        (figure, name) for figure, each in run.published.items() for name in each.panels if each.panel(name).device
    ]
    assert all("device" in differences(run, figure, name) for figure, name in stated)


def test_an_engine_is_refused_where_it_was_not_fitted() -> None:
    run = compose_run(WASTE)
    for other in (replace(run.device, name="h200"), replace(run.device, name="a100-80gb")):
        with pytest.raises(UserError, match="lean"):
            _ = Serving(replace(run, device=other), run.systems[0]).step_model
    for change in ({"num_layers": 39}, {"tp": 2}):
        with pytest.raises(UserError, match="lean"):
            _ = Serving(replace(run, model=replace(run.model, **change)), run.systems[0]).step_model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": {"bandwidth_gb_per_s": 4000.0}}, "another bandwidth_gb_per_s"),
        ({"device": {"tflop_per_s": 990.0}}, "another tflop_per_s"),
        ({"model": {"name": "opt-13b"}}, "this is opt-13b"),
        ({"model": {"num_layers": 33}}, "another num_layers"),
        ({"model": {"dtype": "float32"}}, "another dtype"),
    ],
)
def test_an_engine_is_refused_on_a_device_or_model_of_the_same_name_alone(changes: dict, said: str) -> None:
    run = compose_run("experiment=decode_throughput", "clock=modelled")
    _ = Serving(run, run.systems[0]).step_model
    other = {group: replace(getattr(run, group), **fields) for group, fields in changes.items()}
    with pytest.raises(UserError, match=said):
        _ = Serving(replace(run, **other), run.systems[0]).step_model


def test_rows_say_in_what_a_device_or_a_model_is_not_its_files() -> None:
    lean = ("engine=lean", "device=a100-40gb", "device.bandwidth_gb_per_s=100", "model.num_layers=4")
    name = names_of(compose_run(WASTE, *lean), 0)
    assert (
        name["panel"] == name["setup"] == ("opt-13b (num_layers=4) sharegpt, 1 x a100-40gb (bandwidth_gb_per_s=100.0)")
    )


def test_under_the_lean_engine_a_system_says_whose_it_is_like_and_predicts() -> None:
    run = compose_run(WASTE, "engine=lean")
    rows = [names_of(run, s) for s in range(len(run.systems))]
    assert {"paged (as vLLM)", "orca_max (as Orca(Max))", "contiguous/lean"} <= {row["system"] for row in rows}
    assert {row["evidence"] for row in rows} == {"predicted"}


def test_evidence_follows_from_counts_clock_assumptions_and_fits() -> None:
    run = compose_run(WASTE)
    system = run.systems[0]
    assert named(run, system, counted=True)["evidence"] == "exact"
    assert named(run, system, assuming="beams die so")["evidence"] == "conditional"
    assert named(run, system)["evidence"] == "predicted"
    assert named(replace(run, clock="measured"), system, assuming="nothing")["evidence"] == "measured"
    left_out = replace(run.engine, left_out=[f"fig2/{PANEL}/Orca(Max)/"])
    assert left_out.was_fitted_to(f"fig2/{PANEL}/vLLM/")
    assert not left_out.was_fitted_to(f"fig2/{PANEL}/Orca(Max)/")


def test_what_experiments_state_is_what_the_papers_publish() -> None:
    """Papers, figures, panels and systems that are stated join the published values, except those withheld."""
    table = read_published(PUBLISHED)
    for experiment in names("experiment"):
        for figure, stated in (load("experiment", experiment).get("published") or {}).items():
            rows = table[(table.paper == stated.paper) & (table.figure == figure)]
            if len(rows):
                assert set(rows.panel) & set(stated.panels), f"{experiment}: {figure}"
                assert set(rows.system) & set(stated.systems), f"{experiment}: {figure}"


def test_under_the_lean_engine_a_system_is_as_the_published_one_of_its_own_kernel() -> None:
    systems = "systems=[paged-fa2,paged-flashinfer,vattention-fa2,vattention-flashinfer]"
    run = compose_run("experiment=prefill_throughput", "clock=modelled", "engine=lean", systems)
    labels = {each.name: str(named(run, each)["label"]) for each in run.systems}
    assert labels["vattention-fa2"].endswith("(as FA2_vAttention)")
    assert labels["paged-fa2"].endswith("(as FA2_Paged)")
    assert not labels["paged-flashinfer"].endswith("(as FA2_Paged)")
    assert not labels["vattention-flashinfer"].endswith("(as FA2_vAttention)")

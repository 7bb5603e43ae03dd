"""What was asked for is what runs; what cannot be is refused by its name, before anything is measured."""

from collections.abc import Callable
from typing import get_type_hints

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.published_models import runs_by_model
from kvarena.harness.config import names, typed
from kvarena.harness.kinds import is_of
from kvarena.harness.trace.arrival import ArrivalConfig, draw_arrivals

WASTE = "experiment=memory_waste"


def systems_of(*overrides: str) -> list[str]:
    return [system.name for system in compose_run(WASTE, *overrides).systems]


@pytest.mark.parametrize(
    ("written", "name"),
    [("paged", "paged"), ("paged/fa2", "paged-fa2"), ("[paged]", "paged"), ("vattention-64kb", "vattention-64kb")],
)
def test_one_system_is_a_list_of_one(written: str, name: str) -> None:
    assert systems_of(f"systems={written}") == [name]


@pytest.mark.parametrize("written", ["[]", "null", "5", "[paged,paged]", "[null]", "[[paged]]", "p", "[5]"])
def test_what_names_no_systems_is_refused(written: str) -> None:
    with pytest.raises(UserError, match="systems"):
        systems_of(f"systems={written}")


def test_a_named_model_is_asked_for_and_auto_is_not() -> None:
    """Also the one that the profile has."""
    run_of = "experiment=offline_throughput"
    every = [one.model.name for one in _runs(run_of)]
    assert len(every) > 1
    assert [one.model.name for one in _runs(run_of, "model=auto")] == every
    assert [one.model.name for one in _runs(run_of, f"model={every[0]}")] == every[:1]


def _runs(*overrides: str) -> list:
    run = compose_run(*overrides)
    return runs_by_model(run, run.params.models)


def test_rates_of_one_model_of_several(ran: Callable, own: Callable) -> None:
    done = ran("online_latency", "params.models={yi-6b: 1, llama-3-8b: 2}", "params.rates={yi-6b: [0.25]}",
               "params.shares=[]", "systems=paged-fa2", f"trace.path={own('900,9')}")  # fmt: skip
    of_rates = done.summary[done.summary.quantity == "request_latency_p50_vs_qps"]
    assert set(of_rates.model) == {"yi-6b"}
    assert {"yi-6b", "llama-3-8b"} <= set(done.summary.model), "the other has its capacity"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("paged/fa2{swap_bytes: 1e400}", "swap_bytes=inf: must be bytes, or a size such as 64KB"),
        ("paged/fa2{block_size: true}", "block_size=True: must be a whole number"),
        ("paged/fa2{block_size: -1}", "block_size: -1 is not in"),
        ("vattention/fa2{page_group: 3KB}", "no driver has that size"),
        ("vattention/fa2{max_rows: 99999999999}", "max_rows: 99999999999 is not at most"),
    ],
)
def test_a_bad_option_says_of_which_system(option: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        systems_of(f"systems=[vattention,'{option}']")
    assert option in str(refused.value)
    assert said in str(refused.value)


def test_a_size_is_the_same_however_it_is_written() -> None:
    [one] = compose_run(WASTE, "systems=['vattention/fa2{page_group: 64 KB}']").systems
    [other] = compose_run(WASTE, "systems=['vattention/fa2{page_group: 65536}']").systems
    assert (one.name, one.label, one.allocator) == (other.name, other.label, other.allocator)
    assert "page_group: 64KB" in one.label


# ---- every key of every experiment -----------------------------------------------------------------------------------

WRONG = ("word", True, 1.5, None, {"x": None}, [None], ["x"], {"x": []})


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_key_takes_its_kind_or_says_which(experiment: str) -> None:
    """No traceback, and no value of another kind gets through."""
    schema = registry.get(experiment).Params
    for name, hint in get_type_hints(schema).items():
        for value in WRONG:
            made = _made_or_refused(schema, name, value)
            assert f"params.{name}" in made if isinstance(made, str) else is_of(hint, getattr(made, name))


def _made_or_refused(schema: type, name: str, value: object) -> object:
    try:
        return typed(schema, {name: value}, "params")
    except UserError as refused:
        return str(refused)


@pytest.mark.parametrize(
    "override",
    ["params.paths=[]", "params.paths={alpaca: []}", "params.loads={a: 1}", "params.loads=[5]", "params.seeds=3",
     "params.seeds=[true]", "params.seeds=[]", "params.seeds=[0,0]", "params.seeds=[-1]", "params.pool_bytes=8GB",
     "params.pool_bytes=true", "params.record_every_s=nan", "params.record_every_s=0", "params.pool_bytes=0",
     "trace.num_requests=abc", "trace.mix=[1]", "arrival.rate=[1]", "model.tp=true"],
)  # fmt: skip
def test_the_command_line_says_it_by_name(override: str, ran: Callable) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0].partition(".")[2]):
        ran("batched_requests", override)


@pytest.mark.parametrize("override", ["arrival.rate=1e12", "params.samples=99999999999", "params.samples=1"])
def test_what_no_machine_holds_is_refused(override: str, ran: Callable) -> None:
    with pytest.raises(UserError, match=r"at (most|least)"):
        ran("memory_timeline", "trace.num_requests=9" if "rate" not in override else "trace.num_requests=999999999999",
            "systems=paged", override)  # fmt: skip


@pytest.mark.parametrize("process", ["poisson", "gamma", "constant", "artifact", "sarathi"])
def test_arrivals_closer_than_the_clock_counts(process: str) -> None:
    with pytest.raises(UserError, match=r"arrival\.rate=1e\+308"):
        draw_arrivals(ArrivalConfig(process, rate=1e308, duration_s=5.0), 2, 0)

"""Composition and refusals: what the command line accepts, and what it says where it does not."""

import re

import pytest
from hydra import compose

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run, configuration
from kvarena.harness.config import check_once, check_overrides, load, names
from kvarena.harness.model import load_preset
from kvarena.harness.run.fit import misfit
from kvarena.harness.run.named_systems import kept
from kvarena.harness.trace.arrival import UNDRAWN

DECODE = "experiment=decode_throughput"


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_run(*overrides)
    return str(caught.value)


def test_the_experiment_overrides_the_defaults_and_the_command_line_both() -> None:
    """Pins the place of `_self_` in conf/config.yaml: last, it would silently win over the experiment."""
    with configuration():
        assert compose("config", [DECODE]).name == "decode_throughput"
        assert "cuda" in compose("config", [DECODE]).profiles
    assert [s.name for s in compose_run(DECODE, "systems=[paged-numba]").systems] == ["paged-numba"]


def test_every_experiment_composes_and_fits() -> None:
    for name in names("experiment"):
        modelled = load("experiment", name).get("clock") == "modelled"
        run = compose_run(f"experiment={name}", *([] if modelled else ["device=cpu"]))
        assert run.experiment == name


def test_every_kind_of_device_has_systems_that_it_can_run() -> None:
    """A GPU cannot run the CPU's kernels: the profile names its own, and they fit the profile's model there."""
    with configuration():
        profiles = compose("config", [DECODE]).profiles
    for kind, profile in profiles.items():
        if kind == "modelled":  # an engine's constants say which kernels it prices
            continue
        files = kept(profile.systems, "all", "all")
        assert len(files) > 1
        for file in files:
            assert misfit(file.allocator.name, file.kernel.name, load_preset(profile.model), kind) is None


def test_null_params_come_from_the_profile_of_the_device() -> None:
    run = compose_run(DECODE, "device=cpu", "params.rounds=9")
    assert run.model.name == "bench-llama"
    assert run.params.rounds == 9
    assert run.params.batch_sizes == [1, 4, 8, 16, 32]


@pytest.mark.parametrize("process", UNDRAWN)
def test_arrivals_that_are_not_drawn_take_no_rate_from_a_profile(process: str) -> None:
    run = compose_run("experiment=memory_waste", f"arrival={process}")
    assert (run.arrival.process, run.arrival.rate, run.arrival.duration_s) == (process, None, None)
    assert str(run.arrival) == process.replace("_", " ")
    assert str(compose_run("experiment=memory_waste").arrival) == "4 req/s for 900 s"


def test_allocator_keeps_the_systems_that_use_it_and_sets_its_fields() -> None:
    run = compose_run(DECODE, "device=cpu", "allocator=paged", "allocator.block_size=32")
    assert {s.allocator.name for s in run.systems} == {"paged"}
    assert {s.allocator.block_size for s in run.systems} == {32}
    assert {s.kernel.name for s in run.systems} > {"numba"}


def test_kernel_keeps_the_systems_that_use_it() -> None:
    run = compose_run(DECODE, "device=cpu", "kernel=sdpa")
    assert {s.kernel.name for s in run.systems} == {"sdpa"}


def test_a_named_pair_runs_even_where_the_experiment_does_not_list_it() -> None:
    run = compose_run(DECODE, "device=cpu", "systems=[paged-numba]", "allocator=vattention", "kernel=sdpa")
    assert [s.label for s in run.systems] == ["vattention/sdpa"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experiment=decode_troughput", ("experiment=decode_troughput", "decode_throughput")),
        ("allocator=slab", ("allocator=slab", "paged", "static", "vattention")),
        ("kernel=magic", ("kernel=magic", "numba", "sdpa")),
        ("model=gpt-9", ("model=gpt-9", "yi-6b")),
        ("trace=tweets", ("trace=tweets", "sharegpt")),
        ("systems=[paged-magic]", ("paged-magic", "paged-gather", "paged/fa2")),
        ("allocatr=paged", ("allocatr", "allocator")),
        ("+allocatr=paged", ("allocatr", "allocator")),
        ("trace.sede=1", ("trace.sede", "trace.seed")),
        ("+trace.sede=1", ("trace.sede", "trace.seed")),
        ("params.batchsizes=[1]", ("params.batchsizes", "params.batch_sizes")),
        ("clock=sundial", ("clock=sundial", "measured, modelled")),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(override: str, said: tuple[str, ...]) -> None:
    message = refusal(override) if override.startswith("experiment") else refusal(DECODE, "device=cpu", override)
    for words in said:
        assert words in message


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_an_unknown_field_is_refused_with_or_without_plus(plus: str) -> None:
    message = refusal(DECODE, "device=cpu", "allocator=paged", f"{plus}allocator.blocksize=3")
    assert "allocator.blocksize" in message
    assert "allocator.block_size" in message


@pytest.mark.parametrize("override", ["allocator.block_size=8", "++allocator.block_size=8"])
def test_a_field_of_all_allocators_is_refused(override: str) -> None:
    message = refusal(DECODE, "device=cpu", override)
    assert "allocator=NAME" in message
    assert "paged" in message


def test_a_value_of_the_wrong_type_names_its_key() -> None:
    assert "trace.seed" in refusal(DECODE, "device=cpu", "trace.seed=soon")


def test_a_pair_that_does_not_fit_is_refused_with_the_pairs_that_do() -> None:
    message = refusal(DECODE, "device=cpu", "allocator=paged", "kernel=sdpa")
    assert "paged + sdpa" in message
    assert "static + sdpa" in message
    assert "paged + numba" in message


@pytest.mark.parametrize("block_size", [0, -1, 257])
def test_a_block_size_that_cannot_be_is_refused(block_size: int) -> None:
    assert "block_size" in refusal(DECODE, "device=cpu", "allocator=paged", f"allocator.block_size={block_size}")


def test_a_modelled_device_needs_the_modelled_clock() -> None:
    assert "clock=modelled" in refusal(DECODE, "device=a100-80gb")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("systems=[]", "no system is left"),
        ("systems.0=paged", "systems=VALUE"),
        ("params=null", "params.KEY=VALUE"),
        ("params={rounds: 2}", "params.KEY=VALUE"),
        ("params.batch_sizes.x=1", "params.batch_sizes=VALUE"),
        ("trace.seed.x=1", "trace.seed=VALUE"),
    ],
)
def test_a_list_or_a_number_is_written_whole(override: str, said: str) -> None:
    assert said in refusal(DECODE, "device=cpu", override)


def test_an_experiment_without_a_profile_of_systems_needs_some() -> None:
    assert "no system is left" in refusal("experiment=memory_waste", "systems=null")
    assert compose_run(DECODE, "device=cpu", "systems=null").systems


@pytest.mark.parametrize("second", ["trace.seed=2", "+trace.seed=2", "++trace.seed=1"])
def test_a_key_is_written_once(second: str) -> None:
    with pytest.raises(UserError, match="written twice"):
        check_once([DECODE, "trace.seed=1", second])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experiment=trace_lengths params.paths={nope: lengths.csv}", "params.paths.nope"),
        ("experiment=trace_lengths +params.paths={nope: lengths.csv}", "params.paths.nope"),
        ("experiment=serving_latency params.only=[fig12a] params.paths={alpaca: lengths.csv}", "params.paths.alpaca"),
        ("experiment=serving_latency params.panels.fig12a.rates.nope=[1.0]", "params.panels.fig12a.rates.nope"),
        ("experiment=serving_latency params.panels.fig12a.nope=1", "params.panels.fig12a.nope: no such key"),
        ("experiment=online_latency params.rates={nope: [0.2]}", "params.rates.nope"),
        ("experiment=online_latency params.rates.nope=[0.2]", "params.rates.nope"),
        ("experiment=online_latency params.rates.others=[0.2]", "params.rates.others"),
    ],
)
def test_a_part_that_nothing_reads_is_refused_however_it_is_written(override: str, said: str) -> None:
    name, *keys = override.split(" ", 1)
    assert said in refusal(name, *(key for each in keys for key in _overrides(each)))


def _overrides(line: str) -> list[str]:
    """`a=[1] b={c: 2}` as two overrides: a blank parts them where a key follows."""
    return re.split(r" (?=\+?params)", line)


def test_no_experiment_named() -> None:
    assert "experiment=NAME" in refusal("trace=sharegpt")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("~engine.fitted", "no key can be taken away"),
        ("~scheduler.max_seqs", "no key can be taken away"),
        ("~arrival.process", "no key can be taken away"),
        ("engine.fitted={}", "an empty mapping"),
        ("++params.panels.fig12a={ }", "an empty mapping"),
        ("params.panels={fig12a: {}}", "an empty mapping"),
        ("experiment.name=x", "experiment has no keys of its own"),
    ],
)
def test_what_would_set_nothing_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_overrides(["experiment=serving_latency", override], lambda group, name: None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("params.record_every_s", value) for value in ("nan", "inf", "-1", "0")]
    + [("params.pool_bytes", value) for value in ("-1", "0")],
)
def test_a_number_that_leaves_nothing_to_measure_is_refused(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key):
        compose_run("experiment=memory_waste", f"{key}={value}")
    assert compose_run("experiment=memory_waste", "params.seeds=[0]").params.seeds == [0]

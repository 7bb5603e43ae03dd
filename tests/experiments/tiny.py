"""Every experiment as small as it runs, under each clock that it has: where tests of all keys and systems start."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from kvarena.experiments.command import registry
from kvarena.experiments.command.compose import configuration
from kvarena.harness.config import GROUPS, check_overrides, load
from kvarena.harness.record.record import Frames, Recorder
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import schema_of

# (experiment, clock) -> overrides of its defaults
_FEW = "systems=[orca-max,paged,vattention-64kb]"
TINY: dict[tuple[str, str], tuple[str, ...]] = {
    ("memory_waste", "modelled"): (
        _FEW, "arrival.rate=60", "arrival.duration_s=1", "params.window_s=[0,8]", "params.seeds=[0]",
    ),
    ("memory_waste", "measured"): ("systems=[paged]", "arrival.duration_s=0.01", "trace.max_tokens=64"),
    ("batched_requests", "modelled"): (
        _FEW, "params.seeds=[0]",
        "params.loads=[{figure: fig13a, window: with_drain, trace: sharegpt, rate: 60, duration_s: 1, window_s: null}]",
    ),
    ("batched_requests", "measured"): (
        "systems=[paged]",

        "params.loads=[{figure: fig13a, window: with_drain, trace: sharegpt, rate: 600, duration_s: 0.01, "
        "window_s: null}]",
        "trace.max_tokens=64",
    ),
    ("serving_latency", "modelled"): (
        "systems=[orca-max,paged]", "params.only=[fig12a]", "params.crossing=[]",

        "params.panels={fig12a: {model: opt-13b, device: a100-40gb, trace: sharegpt, duration_s: 4, "
        "rates: {others: [16.0]}}}",
    ),
    ("serving_latency", "measured"): (
        "systems=[paged]", "trace.max_tokens=64",
        "params.panels={fig12a: {trace: sharegpt, duration_s: 2, rates: {others: [16.0]}}}",
    ),
    ("parallel_sampling", "modelled"): (
        "systems=[orca-max,paged,vattention-64kb]", "arrival.duration_s=3", "params.rates=[40]",
        "params.panels={fig14a: {n: 2, guess: {others: 8}}}",
    ),
    ("parallel_sampling", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.2", "trace.max_tokens=64", "params.rates=[16]",
    ),
    ("beam_search", "modelled"): (
        "systems=[orca-max,paged]", "arrival.duration_s=3", "params.rates=[40]",
        "params.panels={fig14d: {n: 2, guess: {others: 8}}}",
    ),
    ("beam_search", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.2", "trace.max_tokens=64", "params.rates=[16]",
    ),
    ("shared_prefix", "modelled"): (
        "systems=[paged,vattention-64kb]", "arrival.duration_s=3", "params.rates=[30]", "params.only=[fig16a]",
    ),
    ("shared_prefix", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.2", "trace.max_tokens=256", "params.rates=[16]",
        "params.only=[fig16a]",
    ),
    ("chatbot", "modelled"): ("systems=[orca-max,paged]", "arrival.duration_s=2", "params.rates=[4]"),
    ("chatbot", "measured"): ("systems=[paged]", "arrival.duration_s=0.2", "params.rates=[16]"),
    ("sharing_savings", "modelled"): (
        "systems=[paged,vattention-64kb]", "arrival.duration_s=3", "params.window_s=[0,8]", "params.n=[2]",
        "params.survivals=[neutral]",
    ),
    ("sharing_savings", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.2", "trace.max_tokens=64", "params.n=[2]",
    ),
    ("block_size", "modelled"): (
        "systems=[paged,vattention-64kb]", "params.rates={sharegpt: 80.0}", "arrival.duration_s=1",
        "params.block_sizes=[8,16]",
    ),
    ("block_size", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.05", "trace.max_tokens=64", "params.block_sizes=[16]",
        "params.rounds=1",
    ),
    ("preemption", "modelled"): (
        "systems=[paged,vattention-64kb]", "arrival.rate=60", "arrival.duration_s=1", "params.block_sizes=[8,16]",
        "params.replay_block_sizes=[16]",
    ),
    ("preemption", "measured"): (
        "systems=[paged]", "model=tiny-llama", "arrival.duration_s=0.05", "trace.max_tokens=64", "params.tokens=32",
        "params.block_sizes=[16]", "params.replay_block_sizes=[16]", "params.victims=2", "params.rounds=1",
    ),
    ("memory_layout", "modelled"): ("systems=[orca-max,paged]", "trace.num_requests=200"),
    ("memory_layout", "measured"): (
        "systems=[paged]", "trace.num_requests=3", "trace.max_tokens=64", "params.rounds=1",
    ),
    ("memory_timeline", "modelled"): ("systems=[paged,vattention-2mb]", "params.samples=5", "trace.num_requests=14"),
    ("trace_lengths", "modelled"): ("params.traces=[sharegpt]",),
    ("granularity", "modelled"): (
        "systems=[paged,vattention]", "arrival.rate=60", "arrival.duration_s=1", "params.block_sizes=[16]",
        "params.page_groups=[2MB]", "params.seeds=[0]", "params.window_s=[0,8]",
    ),
    ("granularity", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.01", "trace.max_tokens=64", "params.block_sizes=[16]",
    ),
    ("waterfall", "modelled"): (
        "systems=[orca-max,paged]", "arrival.rate=60", "arrival.duration_s=1", "params.seeds=[0]",
        "params.window_s=[0,8]",
        "params.capacity_duration_s=4", "params.tolerance=1.0", "params.guess=8",
    ),
    ("waterfall", "measured"): ("systems=[orca-max,paged]", "arrival.duration_s=0.01", "trace.max_tokens=64"),
    ("prefix_cache", "modelled"): (
        "systems=[paged]", "trace.num_requests=30", "params.capacities_gb=[30.0]", "params.pool_bytes=1500000000",
    ),
    ("prefix_cache", "measured"): (
        "systems=[paged]", "trace.num_requests=10", "params.capacities_gb=[0.02]", "params.serve_requests=3",
        "params.repeats=1", "arrival.rate=400",
    ),
    ("calibrate", "measured"): (
        "systems=[paged]", "arrival.duration_s=0.3", "trace.max_tokens=64", "params.batch_sizes=[1,2,3]",
        "params.contexts=[8,16,24]", "params.prompts=[4,8,12]", "params.rounds=1", "params.steps_per_round=1",
    ),
    ("attention_kernel", "measured"): (
        "params.batch_sizes=[2]", "params.contexts=[16]", "params.block_sizes=[16]", "params.kernels=[numba]",
        "params.working_set_bytes=65536", "params.rounds=1",
    ),
    ("block_size_kernel", "measured"): (
        "params.batch_sizes=[1]", "params.context=32", "params.block_sizes=[16,32]", "params.working_set_bytes=65536",
        "params.drawn_blocks=8", "params.rounds=1",
    ),
    ("portability", "measured"): ("model=tiny-llama", "params.prompts=[3]", "params.max_tokens=16"),
    ("vmm_api_latency", "measured"): (
        "params.page_groups=[64KB]", "params.mapped=[2]", "params.created=[2]", "params.runs=[1]", "params.rounds=1",
        "params.calls=1",
    ),
    ("allocation_bandwidth", "measured"): (
        "params.page_groups=[64KB]", "params.pool=1MB", "params.run_groups=2", "params.rounds=1",
        "params.need_models=[yi-6b]",
        "params.need_batches=[1]",
    ),
    ("decode_throughput", "modelled"): (
        "systems=[paged-fa2,paged-flashinfer,vattention-fa2-64kb]", "params.models={yi-6b: 1}",
        "params.batch_sizes=[1,2]",
    ),
    ("decode_throughput", "measured"): (
        "systems=[static-numba,paged-numba]", "model=tiny-llama", "params.batch_sizes=[2]",
        "params.prompts=[trace]", "params.max_tokens=512", "params.warmup_steps=1", "params.check_steps=1",
        "params.rounds=2", "params.steps_per_round=2",
    ),
    ("prefill_throughput", "modelled"): ("params.models={llama-3-8b: 2}", "params.contexts=[1024,4096]"),
    ("prefill_throughput", "measured"): (
        "systems=[static-numba,paged-numba]", "model=tiny-llama", "params.contexts=[16,32]",
        "params.rounds=1", "params.pool_bytes=1048576",
    ),
    ("offline_throughput", "modelled"): (
        "systems=[paged-fa2,vattention-fa2]", "params.models={yi-6b: 1}", "trace.num_requests=8",
        "params.pool_bytes=14000000000",
    ),
    ("offline_throughput", "measured"): (
        "systems=[paged-numba,static-numba]", "model=tiny-llama", "trace.num_requests=3",
        "trace.prompt_tokens=30", "trace.output_tokens=4", "trace.max_tokens=64", "params.pool_bytes=1048576",
    ),
    ("online_latency", "modelled"): (
        "systems=[paged-fa2,vattention-fa2]", "params.models={yi-6b: 1}", "params.rates={yi-6b: [0.25]}",
        "params.shares=[0.5,0.9]", "params.slower=[1.2]", "trace.num_requests=40",
    ),
    ("online_latency", "measured"): (
        "systems=[paged-numba]", "model=tiny-llama", "trace.num_requests=3", "trace.prompt_tokens=30",
        "trace.output_tokens=4", "trace.max_tokens=64", "params.pool_bytes=1048576", "params.shares=[0.9]",
        "params.rates={tiny-llama: [50.0]}",
    ),
    ("page_group_size", "modelled"): (
        "params.gpus={yi-6b: 1}", "params.seeds=[0]", "arrival.duration_s=3",
    ),
    ("allocation_overlap", "modelled"): (
        "params.gpus={llama-3-8b: 2}", "params.iterations=60", "params.max_batch=256", "params.spike_ms=1.0",
        "trace.num_requests=256", "trace.prompt_tokens=2030", "trace.output_tokens=80", "trace.range_ratio=0.005",
    ),
    ("deferred_reclamation", "modelled"): ("params.gpus={yi-6b: 1}",),
}  # fmt: skip
_COMPOSED = (
    *GROUPS[:6],
    "engine",
    "device",
)  # groups of which another choice must be composed; others are read by name


class Unwritten(Recorder):
    """Measures every cell and writes none."""

    def __init__(self) -> None:
        pass

    def cell(self, key: str, measure: Any) -> Frames:
        """The frames, as a run that was continued would read them back."""
        return measure()


def resolved(experiment: str, clock: str, *overrides: str, without: Iterable[str] = ()) -> Run:
    """The tiny run with more overrides, `without` some of its own. Raises UserError like the command line."""
    on = ["device=cpu"] if clock == "measured" else []
    tiny = [override for override in TINY[experiment, clock] if override.partition("=")[0] not in without]
    arguments = [f"experiment={experiment}", f"clock={clock}", *on, *tiny, *overrides]
    check_overrides(arguments, schema_of(arguments, registry.params_schema))
    chosen = tuple(o for o in arguments if "." not in o.partition("=")[0] and o.partition("=")[0] in _COMPOSED)
    config = deepcopy(_composed(chosen))
    with open_dict(config):
        for key, value in _values(o for o in arguments if o not in chosen):
            if key in GROUPS:  # scheduler, allocator, kernel
                config[key] = load(key, value)
            else:
                OmegaConf.update(config, key, value, force_add=True)
        _state_as_tiny(config, TINY[experiment, clock])
    return registry.resolved(config, arguments)


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with configuration():
        return compose("config", list(overrides))


def _state_as_tiny(config: DictConfig, overrides: tuple[str, ...]) -> None:
    """Let the published points have run with the tiny values: whatever else differs must still un-earn their names."""
    for figure in (config.get("published") or {}).values():
        ran, panels = figure.get("ran") or {}, (figure.get("panels") or {}).values()
        for key, value in _values(overrides):
            group, _, name = key.partition(".")
            for stated in (ran, *(panel for panel in panels if panel)):
                if group == "trace" and "trace" in stated:
                    OmegaConf.update(stated, f"trace_keys.{name}", value, force_add=True)
                elif name in (stated.get(group) or {} if name else {}):
                    stated[group][name] = value


def _values(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for override in overrides:
        key, _, value = override.partition("=")
        yield key, OmegaConf.from_dotlist([f"value={value}"]).value


def default_systems(experiment: str, clock: str) -> list[str]:
    """The systems that the experiment compares by default, whatever the tiny run does."""
    config = load("experiment", experiment)
    kind = "modelled" if clock == "modelled" else "cpu"
    return list(config.get("systems") or (config.profiles.get(kind) or {}).get("systems") or [])

"""No key is without effect: a key that the user wrote is read by what runs, or refused, with what to write instead.

Each experiment states which groups it reads under which clock (`READS`), and which keys of those this run does not read
(`unread`). What holds for all of them follows here from the configuration itself: a table knows no file's format, a
fitted step no efficiency. tests/experiments/test_every_key.py tries every key of every experiment.
"""

from collections.abc import Iterator, Mapping

from omegaconf import OmegaConf

from kvarena.allocators.options import option
from kvarena.errors import UserError
from kvarena.harness.config import load
from kvarena.harness.run.run import Run, plain
from kvarena.harness.scheduler.registry import config_class
from kvarena.harness.trace.conversation_table import has_conversations
from kvarena.harness.trace.load import load_trace

Unread = Iterator[tuple[str, str]]  # key, or group, and what to write instead

_ALWAYS = ("experiment", "clock", "params", "hydra")  # what chooses, and what `unread` of an experiment speaks of
_SYSTEMS = ("systems", "allocator", "kernel", "scheduler")  # all read where systems are


def check_read(run: Run[object], own: Mapping[str, str]) -> None:
    """Raises UserError for a given key that nothing reads. `own`: key -> what to write instead, of the experiment."""
    rules = {**dict(_generic(run)), **own}
    for key in _with_parts(run):
        root = key.partition(".")[0]
        if root in _ALWAYS and not any(_covers(rule, key) for rule in rules):
            continue
        for rule, instead in rules.items():
            if _covers(rule, key):
                raise UserError(f"{key}: nothing reads it in this run: {instead}")


def _with_parts(run: Run[object]) -> Iterator[str]:
    """The given keys, and those within a mapping that was written whole: `params.paths={sharegpt: FILE}`.

    Hydra merges it into the file's, whose own parts nobody wrote.
    """
    filed = OmegaConf.to_container(load("experiment", run.experiment).get("params") or OmegaConf.create())
    assert isinstance(filed, dict)
    for key in run.given:
        yield key
        group, _, name = key.partition(".")
        value, kept = getattr(run.params, name, None), filed.get(name) or {}
        if group == "params" and isinstance(value, Mapping):
            parts = {part: plain(it) for part, it in value.items() if it is not None}
            yield from (f"{key}.{part}" for part, it in parts.items() if it != kept.get(part))


def _covers(rule: str, key: str) -> bool:
    """Whether a rule for a key, a group, or a group's choice alone (`decoding=`) speaks of this key."""
    return key == rule.removesuffix("=") or key.startswith(f"{rule}.")


def _generic(run: Run[object]) -> Unread:
    yield from _groups(run)
    for group in ("device", "engine", "trace", "decoding", "scheduler", "allocator", "kernel"):
        yield f"{group}.name", f"a name is no setting; {group}=NAME takes another {group}"
    for speak in (_model, _trace, _arrival, _decoding, _engine, _device, _scheduler, _allocator):
        yield from speak(run)


def _groups(run: Run[object]) -> Unread:
    """Groups that the experiment does not read under this clock."""
    read = {*run.reads, *(_SYSTEMS if "systems" in run.reads else ())}
    for group in ("model", "trace", "arrival", "decoding", "engine", "device", "threads", *_SYSTEMS):
        if group not in read:
            yield group, f"experiment={run.experiment} clock={run.clock} has no use for {group}"
    if run.clock == "modelled":
        if not run.engine.attention:
            yield (
                "kernel",
                f"under clock=modelled engine={run.engine.name} times whole steps, and tells no kernels apart",
            )
        yield "threads", "clock=modelled computes nothing; clock=measured does"


def _model(run: Run[object]) -> Unread:
    if run.clock == "modelled":
        for key in ("rope_theta", "norm_eps", "seed", "checkpoint", "shard_only"):
            yield f"model.{key}", "it changes what is computed, not how long it takes: clock=measured computes"
        if run.pool_bytes is not None:
            yield "model.tied_embeddings", "it changes the weights' memory alone, and params.pool_bytes sets the pool"
        return
    if run.model.family != "llama":
        yield "model.rope_theta", f"the family {run.model.family} has learned positions; llama rotates them"
    if run.model.tp == 1:
        yield "model.shard_only", "model.tp=1 has no shards; model.tp=2 and more have"


_FILE_ONLY = ("format", "time_unit", "block_tokens", "data_files", "split", "tokenizer", "on_bad_record", "shuffle",
              "keep_hash_ids", "prefix_path", "repeat")  # fmt: skip
_GIVEN_ONLY = ("prompt_tokens", "output_tokens", "range_ratio")
_CHATS_ONLY = ("cut_prompt", "cut_output", "new_conversation")


def _trace(run: Run[object]) -> Unread:
    """By where the lengths come from: a file, a table, or as given."""
    trace = run.trace
    yield "trace.paper_filter", "it states the filter of the paper's own data; trace.filter=NAME asks for one"
    if trace.path is not None:
        for key in ("table", *_GIVEN_ONLY):
            yield f"trace.{key}", f"lengths come from trace.path={trace.path}"
        if trace.num_requests is None:
            yield "trace.repeat", "as many are served as arrive, or the whole file: it is for trace.num_requests=N"
        if not (trace.shuffle or trace.mix):
            yield from _no_seed(run, "trace.seed", "the file's order is kept; trace.shuffle=true draws one")
        return
    for key in _FILE_ONLY:
        yield f"trace.{key}", "it says how to read a file: trace.path=FILE"
    if trace.table is None:
        for key in ("filter", "examples", *_CHATS_ONLY):
            yield f"trace.{key}", "lengths are given (trace.prompt_tokens, trace.output_tokens)"
        if trace.range_ratio == 0 and not trace.mix:
            yield from _no_seed(run, "trace.seed", "all lengths are alike; trace.range_ratio draws them")
        return
    for key in _GIVEN_ONLY:
        yield (
            f"trace.{key}",
            f"lengths are drawn from trace.table={trace.table}; trace=fixed or trace=random takes given ones",
        )
    chats = has_conversations(trace.table)
    for key in ("filter",) if chats else _CHATS_ONLY:
        yield f"trace.{key}", f"trace.table={trace.table} is {'one' if chats else 'none'} of conversations"
    yield "trace.examples", "it is for the text of a file: trace.path=FILE; a table has its examples in its lengths"


def _no_seed(run: Run[object], key: str, instead: str) -> Unread:
    """A seed of the trace is the arrivals' too, unless they have their own or are not drawn."""
    if (
        "arrival" not in run.reads
        or run.arrival.seed is not None
        or run.arrival.process in ("recorded", "all_at_once", "constant")
    ):
        yield key, instead


def _arrival(run: Run[object]) -> Unread:
    process = run.arrival.process
    if process != "gamma":
        yield "arrival.burstiness", f"arrival={process} has no shape; arrival=gamma has"
    if process != "artifact":
        yield "arrival.quantum_s", f"arrival={process} falls on no grid; arrival=artifact does"
    if process in ("constant", "recorded", "all_at_once"):
        yield "arrival.seed", f"arrival={process} draws nothing"
    if process == "recorded":
        yield "trace.new_conversation", "turns come as the file records them; arrival=poisson arrival.rate=N draws them"


def _decoding(run: Run[object]) -> Unread:
    name = run.decoding.name
    if run.trace.mix:
        for key in ("decoding=", "decoding.name", "decoding.n"):
            yield key, "trace.mix says how each request is decoded"
        if run.clock == "modelled":
            yield "decoding.temperature", "clock=modelled samples nothing"
        else:
            yield "decoding.survival", "under clock=measured the model's scores say which beams live on"
        return
    if name != "beam" or run.clock == "measured":
        yield "decoding.survival", "it is for decoding=beam under clock=modelled; the model's scores decide otherwise"
    if name != "parallel" or run.clock == "modelled":
        yield "decoding.temperature", "it is for decoding=parallel under clock=measured"
    if (name, run.clock) not in (("beam", "modelled"), ("parallel", "measured")):
        yield "decoding.seed", f"decoding={name} under clock={run.clock} draws nothing"


_HOST = ("host_step_us", "host_sequence_us")
_EFFICIENCIES = ("weights_efficiency", "kv_efficiency", "flop_efficiency")


def _engine(run: Run[object]) -> Unread:
    engine = run.engine
    for key in ("calibrated_on", "left_out", "devices", "models", "schedulers"):
        yield f"engine.{key}", "it states what the file's constants were fitted on"
    if run.clock == "measured":
        if run.device.kind != "cuda":
            yield "engine", "clock=measured runs our own engine on this CPU; clock=modelled takes engine=NAME"
        for key in ("overlaps_host", *_HOST, *_EFFICIENCIES, "fitted", "hosts", "attention"):
            yield f"engine.{key}", "clock=measured takes the time it takes; it is for clock=modelled"
        return
    yield "engine.cuda_graphs", "it is for clock=measured on a GPU"
    if engine.fitted:
        for key in (*_HOST, *_EFFICIENCIES, "hosts", "attention"):
            yield (
                f"engine.{key}",
                f"engine={engine.name} has fitted steps (engine.fitted); engine=lean has efficiencies",
            )
    if engine.attention:
        yield "engine.kv_efficiency", f"engine={engine.name} has a read_efficiency for each kernel (engine.attention)"
    if not (engine.fitted or engine.hosts or engine.host_step_us or engine.host_sequence_us):
        yield "engine.overlaps_host", "the engine's host costs nothing (engine.host_step_us, engine.host_sequence_us)"
    if engine.hosts:
        for key in _HOST:
            yield f"engine.{key}", f"engine={engine.name} has its host's work by devices (engine.hosts)"


def _device(run: Run[object]) -> Unread:
    device, engine = run.device, run.engine
    for key in ("kind", "reported_as", "calibrated_on", "assumed"):
        yield f"device.{key}", "it states what the device of that file is"
    if run.clock == "measured":
        for key in _MODELLED:
            yield f"device.{key}", "this machine is what it is; clock=modelled has device models"
        return
    sizes = {str(option(s.allocator, "page_group")) for s in run.systems}
    if sizes <= {"None"}:
        for key in ("map_us", "unmap_us"):
            yield f"device.{key}", "no system of this run maps page-groups"
    if engine.fitted:
        for key in ("tflop_per_s", "nvlink_gb_per_s", "allreduce_us", "memory_gib"):
            yield (
                f"device.{key}",
                (
                    f"engine={engine.name} has the time of a step and the pool as fitted on {device.name}; "
                    "engine=lean computes them for any device, params.pool_bytes sets the pool"
                ),
            )
        if not _may_copy(run):
            yield (
                "device.bandwidth_gb_per_s",
                f"engine={engine.name} has the time of a step as fitted; engine=lean computes it",
            )
    elif run.model.tp == 1:
        for key in ("nvlink_gb_per_s", "allreduce_us"):
            yield f"device.{key}", "one device talks to no other; model.tp sets how many share the model"
    if run.pool_bytes is not None:
        yield "device.memory_gib", "params.pool_bytes sets the pool"
    if not _may_swap(run):
        for key in ("copy_in_gb_per_s", "copy_out_gb_per_s", "copy_in_us", "copy_out_us"):
            yield f"device.{key}", "no system of this run swaps; allocator=paged allocator.swap_bytes=20GB does"


_MODELLED = ("memory_gib", "bandwidth_gb_per_s", "tflop_per_s", "nvlink_gb_per_s", "allreduce_us", "copy_in_gb_per_s",
             "copy_out_gb_per_s", "copy_in_us", "copy_out_us", "map_us", "unmap_us")  # fmt: skip


def _may_copy(run: Run[object]) -> bool:
    """Whether sequences may share blocks or rows, which are copied on the first write."""
    return "sharing" in run.reads or run.decoding.n > 1 or bool(run.trace.mix)


def _may_swap(run: Run[object]) -> bool:
    return "swapping" in run.reads or any(option(s.allocator, "swap_bytes", 0) not in (0, "0") for s in run.systems)


def _scheduler(run: Run[object]) -> Unread:
    """Fields that no system's scheduler has."""
    for key in (key for key in run.given if key.startswith("scheduler.")):
        field = key.partition(".")[2]
        have = [s for s in run.systems if field in config_class(s.scheduler.name).__dataclass_fields__]
        if not have:
            there = ", ".join(dict.fromkeys(s.scheduler.name for s in run.systems))
            yield key, f"the schedulers of this run ({there}) have no {field}"


def _allocator(run: Run[object]) -> Unread:
    """Fields that need something of the requests: prompts that begin alike, beams, or more sequences than one."""
    if "allocator.prefix_cache" in run.given and not ("caching" in run.reads or _shares_prompts(run)):
        yield "allocator.prefix_cache", f"no prompt of trace={run.trace.name} begins as another's; those of chats do"
    if not ("beams" in run.reads or _decodes(run, "beam")):
        yield "allocator.copy_beams", "no beams run; decoding=beam has them"
    if not (_swaps_when_preempting(run) or "swapping" in run.reads):
        yield "allocator.swap_bytes", "every victim is recomputed; scheduler.preemption=swap swaps"


def _shares_prompts(run: Run[object]) -> bool:
    """Whether prompts are known to begin alike; of a file, whether it has conversations."""
    trace = run.trace
    if trace.keep_hash_ids is not False or trace.new_conversation is not None:
        return True
    is_read = trace.path is not None and trace.tokenizer is None and "trace" in run.reads
    return is_read and load_trace(trace, run.context).conversation_ids is not None


def _decodes(run: Run[object], method: str) -> bool:
    """Whether some request is decoded so."""
    return run.decoding.name == method or any(method in way for way in run.trace.mix or ())


def _swaps_when_preempting(run: Run[object]) -> bool:
    """Whether a victim may be swapped: always, or under `auto` where a request has several sequences."""
    ways = {option(system.scheduler, "preemption", "recompute") for system in run.systems}
    return "swap" in ways or ("auto" in ways and _may_copy(run))

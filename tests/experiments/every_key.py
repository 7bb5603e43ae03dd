"""Every experiment and every key that it offers: what another value of it does. No test: `test_every_key.py` asks it.

A key is *effective* where some other value of it changes a number in rows or frames, or the figure; names alone do not
count. Under the measured clock no two runs agree, so that there a key counts that the run has read: configurations are
watched meanwhile. And a published name is *earned*: no key may change the value of a row that keeps it.
"""

import copy
import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from tiny import TINY, Unwritten, resolved

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.experiments.command.carry_out import measure, summary_of
from kvarena.harness.config import names
from kvarena.harness.record.record import Measured
from kvarena.harness.record.summary import PUBLISHED_KEY
from kvarena.harness.run.published import OURS
from kvarena.harness.run.run import Run

WATCHED = ("model", "trace", "arrival", "decoding", "engine", "device", "params")
NAMES = ("model.name",)  # what rows are called by; published.py reads it
BY_CLOCK = {clock: [name for name, each in TINY if each == clock] for clock in ("modelled", "measured")}


class Made(NamedTuple):
    """What came out of a run."""

    measured: Measured
    summary: pd.DataFrame

    def same(self, other: "Made") -> bool:
        """Whether no number differs, whatever the rows are called."""
        mine, theirs = self.measured, other.measured
        return (
            self._numbers() == other._numbers()
            and mine.frames.keys() == theirs.frames.keys()
            and all(table.equals(theirs.frames[name]) for name, table in mine.frames.items())
        )

    def _numbers(self) -> set[tuple[object, ...]]:
        """A row that earned a published name stands beside one of ours: once is enough."""
        columns = [self.summary[name].astype(str) for name in ("quantity", "x", "value", "n", "ci_low", "ci_high")]
        return set(zip(*columns, strict=True))


def made(run: Run) -> Made:
    measured = measure(run, Unwritten())
    return Made(measured, summary_of(run, measured.frames))


def drawn(run: Run, summary: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    registry.drawn(run.experiment, summary).savefig(file, format="raw")
    return file.getvalue()


# ---- the keys that there are, and other values of them ---------------------------------------------------------------


def offered(run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    """(key, several ways to write another value of it), each a list of overrides."""
    for group in WATCHED[:-1]:
        config = getattr(run, group)
        others = [name for name in names(group) if name not in (config.name if hasattr(config, "name") else "", "auto")]
        yield group, [[f"{group}={name}"] for name in others[:4]]
        for field in dataclasses.fields(config):
            key = f"{group}.{field.name}"
            yield key, [[f"{key}={value}"] for value in other_values(key, getattr(config, field.name))]
    for field in dataclasses.fields(run.params):
        key = f"params.{field.name}"
        yield key, [[f"{key}={value}"] for value in other_values(key, getattr(run.params, field.name))]
    yield (
        "systems",
        [["systems=[paged]"], ["systems=[contiguous]"], ["systems=[vattention-fa2]"], ["systems=[paged-numba]"]],
    )
    yield "threads", [["threads=2"]]
    yield from offered_of_systems(run)


def offered_of_systems(run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    yield "scheduler", [[f"scheduler={name}"] for name in ("chunked_prefill", "sarathi", "vllm")]
    yield "kernel", [["kernel=numba"], ["kernel=sdpa"], ["kernel=fa2"]]
    yield "allocator", [["allocator=contiguous"], ["allocator=paged"], ["allocator=vattention"]]
    schedulers = {type(s.scheduler): s.scheduler for s in run.systems}
    for config in schedulers.values():
        for field in dataclasses.fields(config):
            key = f"scheduler.{field.name}"
            if field.name != "name":
                yield key, [[f"{key}={value}"] for value in other_values(key, getattr(config, field.name))]
    for config in {s.allocator.name: s.allocator for s in run.systems}.values():
        choice = f"allocator={config.name}"
        for field in dataclasses.fields(config):
            key = f"allocator.{field.name}"
            if field.name != "name":
                values = other_values(key, getattr(config, field.name))
                yield f"{choice} {key}", [[choice, f"{key}={value}"] for value in values]


OTHER = {  # values of keys that are words, or null
    "model.name": ["renamed"], "model.family": ["llama", "opt"], "model.dtype": ["float32", "bfloat16", "float16"],
    "model.checkpoint": ["/nowhere"], "model.rope_theta": [5000.0], "trace.name": ["renamed"],
    "trace.path": ["/nowhere.csv"], "trace.format": ["lengths"], "trace.data_files": ["x.json"],
    "trace.split": ["test"], "trace.tokenizer": ["/nowhere"],
    "trace.filter": ["none", "vllm", "paper_figure", "fits_context"], "trace.on_bad_record": ["skip"],
    "trace.table": ["alpaca", "sharegpt", "azure_code"], "trace.num_requests": [3, 5],
    "trace.max_tokens": [64, 256, 1024], "trace.prompt_tokens": [33, 50], "trace.output_tokens": [3, 7],
    "trace.mix": ["{n1: 0.5, n2: 0.5}"], "trace.cut_prompt": [16, 64], "trace.cut_output": [5, 20],
    "trace.new_conversation": [0.2, 0.9], "trace.examples": [1, 5], "trace.prefix_path": ["/nowhere"],
    "arrival.process": ["poisson", "constant"], "arrival.rate": [3.0, 50.0], "arrival.duration_s": [0.5, 3.0],
    "arrival.seed": [7], "decoding.name": ["parallel"],
    "params.paths": ["{sharegpt: /nowhere.csv, alpaca: /nowhere.csv}"], "decoding.n": [2, 3],
    "decoding.survival": ["one", "all"], "engine.name": ["renamed"], "engine.host_step_us": [1000000],
    "engine.host_sequence_us": [1000000], "device.name": ["renamed", "h200"], "device.kind": ["cpu"],
    "device.assumed": ["something"], "scheduler.token_budget": [2100, 4000, 300],
    "scheduler.preemption": ["swap", "recompute"], "scheduler.max_seqs": [3, 1, 2], "allocator.swap_bytes": ["2GB"],
    "allocator.page_group": ["64KB", "256KB", "2MB"], "allocator.estimate": ["max", "oracle", "pow2"],
    "allocator.read_past": [40], "allocator.max_rows": [2, 3], "engine.calibrated_on": ["[x]"],
    "engine.left_out": ["[x]"], "engine.devices": ["[x]"], "engine.schedulers": ["[x]"], "device.reported_as": ["[x]"],
    "device.calibrated_on": ["[x]"], "model.max_tokens": [512, 256, 128, 64, 4096, 100000],
    "allocator.block_size": [8, 32, 64, 256], "arrival.burstiness": [0.3], "allocator.eager_groups": [3],
    "params.max_rows": [2, 3], "allocator.reclaim_threshold": [0.9, 0.0], "allocator.watermark": [0.2],
    "allocator.batch_size": [2], "allocator.max_padded_tokens": [100, 500], "model.tp": [2, 4],
}  # fmt: skip


def other_values(key: str, value: Any) -> list[Any]:
    """Some other values that are likely to be allowed."""
    if key in OTHER:
        return [each for each in OTHER[key] if each != value]
    if isinstance(value, bool):
        return [str(not value).lower()]
    if isinstance(value, int):
        return [value + 1, 2 * value, max(1, value // 2), max(1, value // 1000)]
    if isinstance(value, float):
        return [f"{value * 1.5 + (value == 0):.6g}", f"{value / 2:.6g}", f"{value / 1000:.6g}"]
    if isinstance(value, list):
        return _other_lists(value)
    if isinstance(value, dict):
        return [_written(each) for each in _other_dicts(value)]
    return [3, "64KB", "1GB"] if value is None else [f"{value}x"]


def _other_lists(value: list[Any]) -> list[Any]:
    others = [value[:-1], value[1:], [each for each in value for _ in range(1)][::-1]]
    if value and all(isinstance(each, int | float) for each in value):
        others += [[2 * each for each in value], [*value[:-1], value[-1] + 1], [each + 1 for each in value]]
    return [_written(each) for each in others if each and each != value] or ["[0]", "[16]", "[paged]"]


def _other_dicts(value: dict[Any, Any]) -> Iterator[Any]:
    """The dictionary with every number in it changed, and without its first entry."""

    def changed(node: Any, factor: float) -> Any:
        if dataclasses.is_dataclass(node):
            node = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        if isinstance(node, dict):
            return {k: changed(v, factor) for k, v in node.items()}
        if isinstance(node, list):
            return [changed(each, factor) for each in node]
        if isinstance(node, bool) or not isinstance(node, int | float):
            return node
        return type(node)(node * factor) if node * factor >= 1 or isinstance(node, float) else node + 1

    yield changed(value, 2)
    yield changed(value, 1.5)
    yield changed(value, 1000)
    if len(value) > 1:
        yield changed(dict(list(value.items())[1:]), 1)
    if not value:
        yield {"1": 2.0}


def _written(value: Any) -> str:
    """As the command line has it."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---- modelled: another value, another outcome ------------------------------------------------------------------------


def void_keys(experiment: str) -> list[str]:
    """Keys that the modelled clock accepts, and that change nothing, or leave a published name where they must not."""
    run = resolved(experiment, "modelled")
    base = made(run)
    assert base.same(made(run)), "two runs of one configuration agree"
    picture = drawn(run, base.summary)
    tried = {key: effect_of(experiment, ways, base, picture) for key, ways in offered(run)}
    void = {key: effect for key, effect in tried.items() if effect not in ("changes", "refused")}
    void = {key: effect_beside(experiment, key) if key in BESIDE else effect for key, effect in void.items()}
    return [
        f"{key}: {effect}"
        for key, effect in void.items()
        if effect not in ("changes", "refused") and key not in NAMES and (experiment, key) not in EXEMPT
    ]


# Keys that need more than a tiny load to matter: what both runs are given beside.
BESIDE = {
    "device.unmap_us": ["allocator=vattention", "allocator.deferred_reclamation=false"],
    "trace.filter": ["trace.num_requests=60"],
}
# Void for what the data is: (experiment, key) -> why.
EXEMPT = {("shared_prefix", "trace.filter"): "every sentence of newstest2016 lies within the bounds of every filter"}


def effect_beside(experiment: str, key: str) -> str:
    more = BESIDE[key]
    base_run = resolved(experiment, "modelled", *more)
    base = made(base_run)
    ways = next(ways for each, ways in offered(base_run) if each == key)
    return effect_of(experiment, [[*more, *way] for way in ways], base, drawn(base_run, base.summary))


def effect_of(experiment: str, ways: list[list[str]], base: Made, picture: bytes) -> str:
    """What another value does: `changes` what comes out, is `refused`, is void, or leaves a name where it must not."""
    for overrides in ways:
        try:
            run = resolved(experiment, "modelled", *overrides)
            other = made(run)
        except UserError:
            return "refused"
        if kept := wrongly_kept(base.summary, other.summary):
            return f"{overrides} leaves its name to {kept}"
        if not other.same(base):
            return "changes"
        if other.summary.equals(base.summary) and drawn(run, other.summary) != picture:
            return "changes"
    return "void"


def wrongly_kept(base: pd.DataFrame, other: pd.DataFrame) -> str:
    """A published name that a row keeps although its value has changed; empty where there is none."""
    both = base[base.paper != OURS].merge(other[other.paper != OURS], on=PUBLISHED_KEY, suffixes=("", "_other"))
    wrong = both[(both.value - both.value_other).abs() > 1e-12 * both.value.abs()]
    return "" if wrong.empty else str(tuple(wrong[[*PUBLISHED_KEY, "value", "value_other"]].iloc[0]))


# ---- measured: what is accepted has been read ------------------------------------------------------------------------

_LOOKING = ("dataclasses.py", "published.py", "unread.py", "every_key.py", "run.py", "<string>")


def watched(config: Any, group: str, read: set[str]) -> Any:
    """The configuration, which notes the fields that anybody reads; copies and comparisons of the whole are nobody."""
    fields = {field.name for field in dataclasses.fields(config)}

    def look(self: Any, name: str) -> Any:
        if name in fields and not sys._getframe(1).f_code.co_filename.endswith(_LOOKING):
            read.add(f"{group}.{name}")
        return object.__getattribute__(self, name)

    twin = copy.copy(config)
    watching = type(type(config).__name__, (type(config),), {"__getattribute__": look})
    object.__setattr__(twin, "__class__", watching)
    return twin


def unread_keys(experiment: str) -> list[str]:
    """Keys that are accepted under the measured clock and that nothing reads."""
    run, read = resolved(experiment, "measured"), set[str]()
    made(dataclasses.replace(run, **{group: watched(getattr(run, group), group, read) for group in WATCHED}))
    return [
        key for key, ways in offered(run)
        if key.partition(".")[0] in WATCHED and "." in key and key not in {*read, *NAMES} and accepted(experiment, ways)
    ]  # fmt: skip


def accepted(experiment: str, ways: list[list[str]]) -> bool:
    """Whether any of the other values is taken."""
    for overrides in ways:
        try:
            resolved(experiment, "measured", *overrides)
        except UserError as refused:
            if "nothing reads it" in str(refused):
                return False  # whatever the value
        else:
            return True
    return False

"""A trace from records: what a recipe keeps of them, in the order and number asked for."""

from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import lru_cache
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.files.content import hashes
from kvarena.harness.seeded import Stream
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.few_shot import prefix_path
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.trace import Ints, Trace

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")  # no tokenizer reads them


def file_trace(
    config: TraceConfig, recipe: Recipe, max_tokens: int | None, count: int | None, repeat: bool = True
) -> Trace:
    """The first `count` requests that the recipe keeps, in the file's order or shuffled; repeated if too short.

    repeat: else all of them once.
    """
    trace = _kept(*_source(config), recipe, max_tokens)
    order = Stream(config.seed, "shuffle").permutation(len(trace)) if config.shuffle else np.arange(len(trace))
    count = len(trace) if count is None or (count > len(trace) and not repeat) else count
    facts = {"shuffle": config.shuffle, "seed": config.seed, "requests": count, "rounds": -(-count // len(trace))}
    taken = trace.take(np.resize(order, count)).noting(**facts)
    if taken.conversation_ids is None or trace.conversation_ids is None:
        return taken
    again = np.arange(count) // len(trace) * (1 + trace.conversation_ids.max())  # said once more is by somebody else
    return replace(taken, conversation_ids=taken.conversation_ids + again)


def states_ids(config: TraceConfig) -> bool:
    """Whether the records of `config.path` state ids of their blocks, which `config` keeps where there are."""
    return _read(*_source(config), False)[0].hash_ids is not None


def _source(config: TraceConfig) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """All of a configuration that says what is read and kept of a file, and what the files hold."""
    free = replace(config, seed=0, shuffle=False, num_requests=None, repeat=True, mix=None, new_conversation=None)
    return astuple(free), (*hashes([config.path]).values(), *hashes(read_with(config), "file").values())


def read_with(config: TraceConfig) -> Iterator[str]:
    """The files that a trace's file is read with: what its prompts begin with, and its tokenizer's."""
    prefix = None if config.examples is None else prefix_path(config)
    if prefix is not None:
        yield str(prefix)
    tokenizer = config.tokenizer or ""
    words = sorted(Path(tokenizer).glob("*")) if isdir(tokenizer) else []
    yield from (str(file) for file in words if file.is_file() and file.suffix not in _WEIGHTS)


@lru_cache(maxsize=4)
def _read(fields: tuple[Any, ...], held: tuple[str, ...], any_first_turn: bool) -> tuple[Trace, Ints]:
    """Every well-formed record, and its number in the file. held: by the files that it is read from."""
    from kvarena.harness.trace.reading import read  # imports pandas and pyarrow, which take a while

    config = TraceConfig(*fields)
    clean, facts = read(config, Recipe("none", any_first_turn=any_first_turn))
    whole = Trace(
        name=Path(str(config.path)).stem,
        source=str(config.path),
        prompt_tokens=clean["prompt_tokens"],
        output_tokens=clean["output_tokens"],
        arrival_s=clean.get("arrival_s"),
        conversation_ids=clean.get("conversation_id"),
        hash_ids=tuple(clean["hash_ids"]) if "hash_ids" in clean else None,
        block_tokens=facts.get("block_tokens"),
        provenance=facts,
    )
    return whole, clean["record"]


@lru_cache(maxsize=4)  # a sweep over rates or seeds reads its file once
def _kept(fields: tuple[Any, ...], held: tuple[str, ...], recipe: Recipe, max_tokens: int | None) -> Trace:
    """Every request that the recipe keeps and the context holds, and the counts of the others."""
    config = TraceConfig(*fields)
    whole, numbers = _read(fields, held, recipe.any_first_turn)
    trace = whole.cut(config.cut_prompt, config.cut_output)
    kept = np.flatnonzero(recipe.keeps(trace.prompt_tokens, trace.output_tokens))
    # Who asks for a filter hears of what it should have left out; else the context is the filter.
    over_long = BadRecords(trace.source, "skip" if config.filter is None else config.on_bad_record)
    fitting = _within_context(trace, kept, numbers, max_tokens, over_long)
    if config.filter is not None:  # else the run says it in the line of its trace
        over_long.report()
    facts = {**whole.provenance, "recipe": recipe.name, "filtered": len(trace) - len(kept)}
    facts |= {"over_long": over_long.count, "over_long_reasons": over_long.reasons, "kept": len(fitting)}
    facts |= {"max_total": max_tokens} | {
        f"{name}s_cut": int((getattr(whole, f"{name}_tokens") != getattr(trace, f"{name}_tokens"))[fitting].sum())
        for name in ("prompt", "output")
    }
    if not len(fitting):
        counts = ("read", "malformed", "without_request", "failed", "filtered", "over_long")
        lost = ", ".join(f"{key} {facts[key]}" for key in counts if key in facts)
        advice = "trace.filter=none drops fewer, trace.cut_prompt=N and trace.cut_output=N shorten them"
        if not len(whole):
            advice = "; ".join(facts["malformed_reasons"]) or "nothing of it asks for an answer"
        raise UserError(
            f"{config.path}: no request is left ({lost}) by filter {recipe.name} and a context of "
            f"{max_tokens or 'any number of'} tokens; {advice}"
        )
    return trace.take(fitting).noting(**facts)


def _within_context(trace: Trace, kept: Ints, records: Ints, max_tokens: int | None, bad: BadRecords) -> Ints:
    """Positions, of those kept, of requests that the context holds; the others go to `bad`."""
    if max_tokens is None:
        return kept
    total = trace.total_tokens
    for i in kept[total[kept] > max_tokens]:
        bad.add(
            int(records[i]),
            f"prompt + output = {total[i]} tokens, the context holds {max_tokens}; trace.filter=fits_context leaves "
            "such requests out",
        )
    return kept[total[kept] <= max_tokens]

"""A trace from records: what a recipe keeps of them, in the order and number asked for."""

from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.files.local_file import local_file
from kvarena.harness.seeded import Stream
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.few_shot import prefix_path
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.trace import Ints, Trace

_Stamp = tuple[str, int, int]  # a file's path, time of change, size


def file_trace(config: TraceConfig, recipe: Recipe, max_tokens: int | None, count: int | None) -> Trace:
    """The first `count` requests that the recipe keeps, in the file's order or shuffled; repeated if too short."""
    fields = astuple(replace(config, seed=0, shuffle=False, num_requests=None, mix=None, new_conversation=None))
    stamps = _stamp(local_file(str(config.path))), _stamp(prefix_path(config))
    trace = _kept(fields, recipe, max_tokens, stamps)
    order = Stream(config.seed, "shuffle").permutation(len(trace)) if config.shuffle else np.arange(len(trace))
    count = len(trace) if count is None else count
    facts = {"shuffle": config.shuffle, "seed": config.seed, "requests": count, "rounds": -(-count // len(trace))}
    return trace.take(np.resize(order, count)).noting(**facts)


def _stamp(path: Path | None) -> _Stamp:
    """What changes when the file does."""
    if path is None:
        return "", 0, 0
    stat = path.stat()
    return str(path.resolve()), stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4)  # a sweep over rates or seeds reads its file once
def _kept(fields: tuple[Any, ...], recipe: Recipe, max_tokens: int | None, stamps: tuple[_Stamp, _Stamp]) -> Trace:
    """Every request that the recipe keeps and the context holds, and the counts of the others."""
    from kvarena.harness.trace.reading import read  # imports pandas and pyarrow, which take a while

    config = TraceConfig(*fields)
    clean, facts = read(config, recipe)
    whole = Trace(
        name=Path(str(config.path)).stem,
        source=str(config.path),
        prompt_tokens=clean["prompt_tokens"],
        output_tokens=clean["output_tokens"],
        arrival_s=clean.get("arrival_s"),
        conversation_ids=clean.get("conversation_id"),
        hash_ids=tuple(clean["hash_ids"]) if "hash_ids" in clean else None,
    )
    trace = whole.cut(config.cut_prompt, config.cut_output)
    kept = np.flatnonzero(recipe.keeps(trace.prompt_tokens, trace.output_tokens))
    # Who asks for a filter hears of what it should have left out; else the context is the filter.
    over_long = BadRecords(trace.source, "skip" if config.filter is None else config.on_bad_record)
    fitting = _within_context(trace, kept, clean["record"], max_tokens, over_long)
    if config.filter is not None:  # else the run says it in the line of its trace
        over_long.report()
    facts = {**facts, "recipe": recipe.name, "filtered": len(trace) - len(kept)}
    facts |= {"over_long": over_long.count, "over_long_reasons": over_long.reasons, "kept": len(fitting)}
    facts |= {"max_total": max_tokens} | {
        f"{name}s_cut": int((getattr(whole, f"{name}_tokens") != getattr(trace, f"{name}_tokens"))[fitting].sum())
        for name in ("prompt", "output")
    }
    if not len(fitting):
        counts = ("read", "malformed", "without_request", "filtered", "over_long")
        raise UserError(
            f"{config.path}: no request is left ({', '.join(f'{key} {facts[key]}' for key in counts)}) by filter "
            f"{recipe.name} and a context of {max_tokens or 'any number of'} tokens; trace.filter=none drops fewer, "
            "trace.cut_prompt=N and trace.cut_output=N shorten them"
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

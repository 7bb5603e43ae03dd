"""A trace by its configuration."""

from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.seeded import Stream
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.given import given_lengths
from kvarena.harness.trace.length_table import length_table, sample, table_names
from kvarena.harness.trace.recipes import Recipe, recipe
from kvarena.harness.trace.trace import Ints, Trace

DEFAULT_REQUESTS = 1000  # drawn where neither a file nor the user nor the arrivals say how many


def load_trace(config: TraceConfig, max_tokens: int | None = None, num_requests: int | None = None) -> Trace:
    """The trace that `config` describes: the same for the same seed, on every platform.

    max_tokens: the model's context; a file's request beyond it is a bad record, a table's is drawn within it.
    num_requests: as many as arrive; None: `config.num_requests`, else the whole file, or 1000 where there is none.
    Raises UserError for whatever the user got wrong.
    """
    limits = [limit for limit in (max_tokens, config.max_tokens) if limit is not None]
    limit = min(limits) if limits else None
    rule = recipe(config.filter, limit)
    count = config.num_requests if num_requests is None else num_requests
    if count is not None and count < 1:
        raise UserError(f"trace.num_requests={count}: must be at least 1")
    if config.path is not None:
        return _from_file(config, rule, limit, count)
    count = DEFAULT_REQUESTS if count is None else count
    if config.table is not None:
        return sample(length_table(config.table), count, config.seed, rule.within(limit))
    return _given(config, count, limit)


def _given(config: TraceConfig, count: int, limit: int | None) -> Trace:
    if config.prompt_tokens is None or config.output_tokens is None:
        raise UserError(
            f"trace={config.name}: set trace.path (a file or a hub name), trace.table (one of "
            f"{', '.join(table_names())}), or both trace.prompt_tokens and trace.output_tokens"
        )
    trace = given_lengths(
        config.name, config.prompt_tokens, config.output_tokens, config.range_ratio, count, config.seed
    )
    longest = int(trace.total_tokens.max())
    if limit is not None and longest > limit:
        raise UserError(f"trace={config.name}: prompt + output = {longest} tokens, the context holds {limit}")
    return trace


def _from_file(config: TraceConfig, rule: Recipe, limit: int | None, count: int | None) -> Trace:
    """The first `count` requests that the recipe keeps, in the file's order or shuffled; repeated if too short."""
    trace = _read_file(astuple(replace(config, seed=0, shuffle=False, num_requests=None)), rule, limit, _stamp(config))
    order = Stream(config.seed, "shuffle").permutation(len(trace)) if config.shuffle else np.arange(len(trace))
    count = len(trace) if count is None else count
    facts = {"shuffle": config.shuffle, "seed": config.seed, "requests": count, "rounds": -(-count // len(trace))}
    return trace.take(np.resize(order, count)).noting(**facts)


def _stamp(config: TraceConfig) -> tuple[int, int]:
    """What changes when the file does."""
    path = Path(str(config.path)).expanduser()
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else (0, 0)


@lru_cache(maxsize=4)  # a sweep over rates or seeds reads its file once
def _read_file(fields: tuple[Any, ...], rule: Recipe, limit: int | None, stamp: tuple[int, int]) -> Trace:
    """Every request of the file that the recipe keeps."""
    from kvarena.harness.trace.reading import read  # imports datasets, which takes a second

    config = TraceConfig(*fields)
    reading = read(config, rule)
    table = reading.dataset.data
    clean = {name: table.column(name).to_numpy() for name in reading.dataset.column_names}
    trace = Trace(
        name=config.name,
        source=str(config.path),
        prompt_tokens=clean["prompt_tokens"],
        output_tokens=clean["output_tokens"],
        arrival_s=clean.get("arrival_s"),
        conversation_ids=clean.get("conversation_id"),
        hash_ids=tuple(clean["hash_ids"]) if "hash_ids" in clean else None,
    )
    kept = np.flatnonzero(rule.keeps(trace.prompt_tokens, trace.output_tokens))
    fitting = _within_context(trace, kept, clean["record"], limit, config)
    facts = {"recipe": rule.name, "filtered": len(trace) - len(kept), "over_long": len(kept) - len(fitting)}
    facts = reading.facts | facts | {"kept": len(fitting)}
    if not len(fitting):
        counts = ", ".join(f"{key} {facts[key]}" for key in ("read", "malformed", "without_request", "filtered"))
        raise UserError(f"{config.path}: no request is left ({counts}, over-long {facts['over_long']})")
    return trace.take(fitting).noting(**facts)


def _within_context(trace: Trace, kept: Ints, records: Ints, limit: int | None, config: TraceConfig) -> Ints:
    """Positions, of those kept, of requests that the context holds; the others are bad records."""
    if limit is None:
        return kept
    bad = BadRecords(trace.source, config.on_bad_record)
    total = trace.total_tokens
    for i in kept[total[kept] > limit]:
        bad.add(
            int(records[i]),
            f"prompt + output = {total[i]} tokens, the context holds {limit}; trace.filter=fits_context leaves such "
            "requests out",
        )
    bad.report()
    return kept[total[kept] <= limit]

"""A trace by its configuration."""

from kvarena.errors import UserError
from kvarena.harness.trace.arrival import MOST_REQUESTS
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.constant_lengths import given_lengths
from kvarena.harness.trace.conversation_table import has_conversations, sample_conversations
from kvarena.harness.trace.file_trace import file_trace
from kvarena.harness.trace.length_table import length_table, sample, table_names
from kvarena.harness.trace.published_files import filter_of
from kvarena.harness.trace.recipes import recipe
from kvarena.harness.trace.trace import Trace
from kvarena.harness.trace.units import check_units

DEFAULT_REQUESTS = 1000  # drawn where neither a file nor the user nor the arrivals say how many


def load_trace(config: TraceConfig, max_tokens: int | None = None, num_requests: int | None = None) -> Trace:
    """The trace that `config` describes: the same for the same seed, on every platform.

    max_tokens: the model's context. A table's request is drawn within it; a file's beyond it is dropped and counted, or
    a bad record where the user asks for a filter that keeps it.
    num_requests: as many as arrive; None: `config.num_requests`, else the whole file, or 1000 where there is none.
    Raises UserError for whatever the user got wrong.
    """
    limits = [limit for limit in (max_tokens, config.max_tokens) if limit is not None]
    limit = min(limits) if limits else None
    rule = recipe(filter_of(config, limit), limit)
    count = config.num_requests if num_requests is None else num_requests
    if count is not None and count < 1:
        raise UserError(f"trace.num_requests={count}: must be at least 1")
    if count is not None and count > MOST_REQUESTS:
        raise UserError(f"trace.num_requests={count}: must be at most {MOST_REQUESTS}")
    _check_cuts(config)
    check_units(config)
    if config.path is not None:
        return file_trace(config, rule, limit, count, repeat=config.repeat or num_requests is not None)
    count = DEFAULT_REQUESTS if count is None else count
    if config.table is not None and has_conversations(config.table):
        return sample_conversations(config.table, count, config.seed, config.cut_prompt, config.cut_output, limit)
    if config.table is not None:
        return sample(length_table(config.table), count, config.seed, rule.within(limit))
    return _given(config, count, limit)


def _check_cuts(config: TraceConfig) -> None:
    for key in ("cut_prompt", "cut_output"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UserError(f"trace.{key}={value}: must be at least 1")
    if config.new_conversation is not None and not 0 <= config.new_conversation <= 1:
        raise UserError(f"trace.new_conversation={config.new_conversation}: is a probability, 0 to 1")


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

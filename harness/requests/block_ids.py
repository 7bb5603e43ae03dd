"""Ids of the blocks of a chat's prompts, as Mooncake's traces state them: equal where all tokens up to there are equal.

turn 0   |question 0 .|                       whole blocks: named by conversation and place, as later turns only
turn 1   |question 0 answer 0 |question 1.|   append to them; the last, partly filled block is each turn's own
"""

from collections.abc import Iterator

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.trace.trace import Ints, Trace

MOONCAKE_BLOCK = 512  # tokens


def block_ids(trace: Trace, block_tokens: int = MOONCAKE_BLOCK) -> tuple[Ints, ...]:
    """One array of ids for each request, [ceil(prompt / block)]: the trace's own, else those of its conversations.

    block_tokens: of a block of a conversation. Raises UserError for a trace that has neither, or whose histories are
    cut: a cut prompt begins somewhere else in every turn, so that nothing of it is found again.
    """
    if trace.hash_ids is not None:
        return trace.hash_ids
    if trace.conversation_ids is None:
        raise UserError(
            f"{trace.source}: its prompts share nothing that is known: neither hash_ids nor conversation_id"
        )
    if trace.provenance.get("cut_prompt") is not None:
        raise UserError("trace.cut_prompt: a history that is cut shares no prefix with the turn before")
    return tuple(_of_chat(trace, block_tokens))


def _of_chat(trace: Trace, block_tokens: int) -> Iterator[Ints]:
    longest = int(trace.prompt_tokens.max()) // block_tokens + 1
    own = -1  # ids of partly filled blocks are negative, and never come again
    assert trace.conversation_ids is not None
    for conversation, prompt in zip(trace.conversation_ids.tolist(), trace.prompt_tokens.tolist(), strict=True):
        whole = prompt // block_tokens
        ids = conversation * longest + np.arange(whole, dtype=np.int64)
        if prompt % block_tokens:
            ids, own = np.append(ids, own), own - 1
        yield ids

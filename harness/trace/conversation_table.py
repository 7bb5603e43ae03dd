"""Conversations from an embedded length table that also counts how many turns a conversation has.

The number of turns is drawn from the table's counts; each turn's question and answer from its joint lengths. A turn's
prompt is everything said before it and its question.
"""

import csv
from functools import cache
from pathlib import Path

import numpy as np

from kvarena.harness.seeded import Stream
from kvarena.harness.trace.length_table import length_table, sample
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.trace import Ints, Trace

_FOLDER = Path(__file__).parent / "length_tables"


def has_conversations(name: str) -> bool:
    """Whether the table of that name counts turns."""
    return len(_turn_counts(name)) > 0


@cache
def _turn_counts(name: str) -> Ints:
    """Conversations of 1, 2, ... turns; empty for a table of single requests."""
    path = _FOLDER / f"{name}.csv"
    if not path.is_file():
        return np.empty(0, np.int64)
    with path.open(newline="") as file:
        rows = [row[1:] for row in csv.reader(file) if row[0] == "turns"]
    return np.array(rows[0] if rows else [], np.int64)


def sample_conversations(
    name: str, count: int, seed: int, cut_prompt: int | None, cut_output: int | None, max_tokens: int | None
) -> Trace:
    """Draw `count` turns, conversation by conversation; the first n of them are those of a draw of n.

    A conversation ends before the turn that the context does not hold: without cuts, where its history has grown too
    long; turns that no context holds are cut to it.
    """
    said = sample(length_table(name), count, seed, Recipe("none"))
    counts = _turn_counts(name)
    drawn = Stream(seed, "turns").below(count, int(counts.sum()))
    turns = 1 + np.searchsorted(np.cumsum(counts), drawn, side="right")
    answer = said.output_tokens if cut_output is None else np.minimum(said.output_tokens, cut_output)
    conversation, prompt, whole = (np.zeros(count, np.int64) for _ in range(3))
    number, left, history = -1, 0, 0
    for i, (question, reply) in enumerate(zip(said.prompt_tokens.tolist(), answer.tolist(), strict=True)):
        whole[i] = history + question
        length = _cut(int(whole[i]), cut_prompt)
        if left == 0 or (max_tokens is not None and length + reply > max_tokens):
            number, left, history = number + 1, int(turns[number + 1]), 0
            whole[i], length = question, _cut(question, cut_prompt)
        conversation[i], prompt[i] = number, length
        left, history = left - 1, history + question + int(said.output_tokens[i])
    prompts_cut, outputs_cut = int((whole > prompt).sum()), int((said.output_tokens > answer).sum())
    over = 0
    if max_tokens is not None:
        over = int((prompt + answer > max_tokens).sum())
        prompt = np.clip(prompt, 1, max_tokens - 1)
        answer = np.minimum(answer, max_tokens - prompt)
    facts = {**said.provenance, "conversations": number + 1, "cut": over, "max_total": max_tokens}
    facts |= {"cut_prompt": cut_prompt, "prompts_cut": prompts_cut}
    facts |= {"cut_output": cut_output, "outputs_cut": outputs_cut}
    return Trace(name, said.source, prompt, answer, conversation_ids=conversation, provenance=facts)


def _cut(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)

"""Turns of conversations: whose each one is, and whether its prompt can hold all that was said before it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvarena.harness.trace.trace import Ints


def conversation_numbers(ids: Any) -> Ints:
    """Conversations numbered as they come, by their ids as texts: [N]. Who has no id, or a blank one, is alone."""
    codes, texts = pd.factorize(np.asarray(ids, dtype=object))
    blank = np.array([not text.strip() for text in texts], dtype=bool)
    alone = (codes < 0) | np.append(blank, True)[codes]
    codes[alone] = len(texts) + np.arange(np.count_nonzero(alone))
    return np.asarray(pd.factorize(codes)[0], np.int64)


def without_history(
    conversation: Ints, prompt: Ints, output: Ints, arrival_s: NDArray[np.float64] | None
) -> dict[int, str]:
    """Position -> reason, of turns whose prompt is shorter than the prompt and the answer of the turn before.

    Turns follow one another as they arrive, else as they stand. A turn that is left out has not been said.
    """
    by_time = np.arange(len(prompt)) if arrival_s is None else np.argsort(arrival_s, kind="stable")
    order = by_time[np.argsort(conversation[by_time], kind="stable")]
    same = np.diff(conversation[order]) == 0
    short = same & (prompt[order][1:] < (prompt + output)[order][:-1])
    doubtful = np.isin(conversation, np.unique(conversation[order][1:][short]))
    return dict(_short_turns(order[doubtful[order]], conversation, prompt, output))


def _short_turns(order: Ints, conversation: Ints, prompt: Ints, output: Ints) -> Iterator[tuple[int, str]]:
    said, of = 0, -1
    for i in order.tolist():
        if conversation[i] != of:
            said, of = 0, int(conversation[i])
        if prompt[i] < said:
            yield (
                i,
                f"its prompt of {prompt[i]} tokens does not hold the {said} of its conversation before it: a turn's "
                "prompt begins with all that was said, or has no conversation_id",
            )
        else:
            said = int(prompt[i] + output[i])

"""In which order the turns of many conversations arrive (PagedAttention section 6.5, as its artifact has it).

An arrival begins a new conversation with some probability, else a random one of those begun goes on. The turns are the
same whatever the probability: it decides only how many conversations are under way, and so how soon long histories
come. The paper's runs used 0.5 for vLLM and 0.1 for Orca.
"""

import random

import numpy as np
import pandas as pd

from kvarena.harness.trace.trace import Ints


def chatbot_order(conversation_ids: Ints, new_conversation: float, seed: int) -> Ints:
    """The order of arrival of turns: positions, [N], each once. Those of a conversation keep theirs.

    Where no conversation is under way, the next arrival begins one. Draws from Python's generator as the artifact does.
    """
    draw = random.Random(seed)
    numbers = pd.factorize(conversation_ids)[0]
    turns = np.argsort(numbers, kind="stable")  # conversation by conversation, as most files have them
    begins = np.flatnonzero(np.diff(numbers[turns], prepend=-1))
    new = [(int(a), int(b)) for a, b in zip(begins, [*begins[1:], len(conversation_ids)], strict=True)]
    draw.shuffle(new)
    under_way: list[tuple[int, int]] = []  # (next turn, end)
    order = []
    for _ in range(len(conversation_ids)):
        is_new = draw.uniform(0, 1) < new_conversation and new
        source = new if is_new or not under_way else under_way
        place = draw.randint(0, len(source) - 1)
        turn, end = source[place]
        order.append(turn)
        if turn + 1 == end:
            del source[place]
        elif source is new:
            under_way.append((turn + 1, end))
            del source[place]
        else:
            source[place] = (turn + 1, end)
    return turns[np.array(order, np.int64)]

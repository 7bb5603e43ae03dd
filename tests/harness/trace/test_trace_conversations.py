"""Chats: cut histories, the order of arrival of PagedAttention's chatbot, conversations from a table."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.requests.chatbot_order import chatbot_order
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.arrival import ArrivalConfig

TABLE = TraceConfig(table="sharegpt_multiturn")
ARRIVALS = ArrivalConfig(process="artifact", rate=1.0, duration_s=600)


def chat(**fields):
    return replace(typed(TraceConfig, load("trace", "sharegpt_chat"), "trace"), **fields)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 9))
def test_every_turn_comes_once_and_in_its_conversations_order(turns, probability, seed):
    ids = np.repeat(np.arange(len(turns)), turns)
    order = chatbot_order(ids, probability, seed)
    assert sorted(order) == list(range(len(ids)))
    for conversation in range(len(turns)):
        mine = [i for i in order if ids[i] == conversation]
        assert mine == sorted(mine)


def test_a_probability_of_one_begins_all_first():
    ids = np.repeat(np.arange(50), 3)
    order = chatbot_order(ids, 1.0, 0)
    assert sorted(ids[order[:50]]) == list(range(50)), "nobody goes on before all have begun"
    assert sorted(ids[chatbot_order(ids, 0.0, 0)][:3]) == [ids[chatbot_order(ids, 0.0, 0)[0]]] * 3, "one by one"


def test_draws_of_the_artifact():
    """Step by step what its loop does with Python's global generator: shuffle, then uniform and randint an arrival."""
    turns = [3, 1, 4, 2, 1, 5]
    ids = np.repeat(np.arange(len(turns)), turns)
    random.seed(7)
    unstarted = [[int(i) for i in np.flatnonzero(ids == c)] for c in range(len(turns))]
    random.shuffle(unstarted)
    started, wanted = [], []
    while unstarted or started:
        if (random.uniform(0, 1) < 0.5 and unstarted) or not started:
            conversation = unstarted.pop(random.randint(0, len(unstarted) - 1))
            wanted.append(conversation.pop(0))
            if conversation:
                started.append(conversation)
        else:
            place = random.randint(0, len(started) - 1)
            wanted.append(started[place].pop(0))
            if not started[place]:
                del started[place]
    assert chatbot_order(ids, 0.5, 7).tolist() == wanted


def test_histories_are_cut_to_their_last_tokens(data_file):
    path = str(data_file("sharegpt_multiturn_lengths.csv"))
    whole = load_trace(TraceConfig(path=path))
    cut = load_trace(chat(path=path), 2048)
    assert len(cut) == len(whole)
    assert whole.prompt_tokens.max() > 1024
    assert (cut.prompt_tokens == np.minimum(whole.prompt_tokens, 1024)).all()
    assert (cut.output_tokens == np.minimum(whole.output_tokens, 1016)).all()
    assert cut.provenance["cut_prompt"] == 1024


def test_the_same_turns_whatever_the_probability(data_file):
    """As many conversations as arrivals have turns for: 0.5 and 0.1 differ in the order alone."""
    half, tenth = (
        make_workload(chat(path=str(data_file("sharegpt_multiturn_lengths.csv")), new_conversation=p), ARRIVALS, 2048)
        for p in (0.5, 0.1)
    )
    assert (half.arrival_ps == tenth.arrival_ps).all()
    assert sorted(zip(half.prompt_tokens, half.output_tokens, strict=True)) == sorted(
        zip(tenth.prompt_tokens, tenth.output_tokens, strict=True)
    )
    early = slice(0, len(half) // 3)
    assert half.prompt_tokens[early].mean() < tenth.prompt_tokens[early].mean()


def test_a_turns_prompt_is_all_that_was_said():
    drawn = load_trace(TraceConfig(table="sharegpt_multiturn", num_requests=200))
    same = np.diff(drawn.conversation_ids) == 0
    assert same.any()
    assert (np.diff(drawn.prompt_tokens)[same] > drawn.output_tokens[:-1][same]).all()


def test_a_conversation_ends_where_the_context_does():
    drawn = load_trace(TraceConfig(table="sharegpt_multiturn", num_requests=2000), max_tokens=1500)
    assert drawn.total_tokens.max() <= 1500
    assert drawn.prompt_tokens.min() >= 1
    assert drawn.output_tokens.min() >= 1


def test_a_longer_chat_begins_with_the_shorter():
    short, long = (load_trace(chat(num_requests=n), 2048) for n in (100, 1000))
    assert short.prompt_tokens.tolist() == long.prompt_tokens[:100].tolist()
    assert short.conversation_ids.tolist() == long.conversation_ids[:100].tolist()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cut_prompt": 0}, r"trace\.cut_prompt=0"),
        ({"cut_output": -1}, r"trace\.cut_output=-1"),
        ({"new_conversation": 1.5}, "probability"),
        ({"table": "sharegpt"}, "has no conversations"),
    ],
)
def test_bad_input(fields, reason):
    with pytest.raises(UserError, match=reason):
        make_workload(chat(**fields), ARRIVALS, 2048)

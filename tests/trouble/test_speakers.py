"""Who says what in a chat: the names that data sets use, however they are written; an unknown one is told."""

import json

import pytest


def chat(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


ASKING = ["human", "user", "User", "USER", "Human"]
ANSWERING = ["gpt", "GPT", "assistant", "Assistant", "model", "chatgpt", "ChatGPT", "bing", "bard", "Bard"]


def test_the_usual_names(loaded, tokenizer):
    chats = [chat((a, "one two"), (b, "three")) for a in ASKING for b in ANSWERING]
    file = loaded(json.dumps(chats), tokenizer=tokenizer)
    assert (file.prompts, file.bad) == ([3] * 50, [])


@pytest.mark.parametrize("system", ["system", "System"])
def test_the_system_neither_asks_nor_answers(loaded, tokenizer, system):
    file = loaded(json.dumps([chat((system, "be kind"), ("user", "one"), ("model", "two three"))]), tokenizer=tokenizer)
    assert (file.prompts, file.trace.output_tokens.tolist()) == ([2], [3])


@pytest.mark.parametrize(
    "turns",
    [("alien", "gpt"), ("human", "alien"), ("alien", "human", "gpt"), ("human", "", "gpt"), ("human", "gpt4all")],
)
def test_an_unknown_speaker_is_told(loaded, tokenizer, turns):
    chats = [chat(("human", "a"), ("gpt", "b")), chat(*((who, "x") for who in turns))]
    file = loaded(json.dumps(chats), tokenizer=tokenizer)
    assert (file.read, file.bad) == (2, [2])
    (unknown,) = set(turns) - {"human", "gpt"}
    assert repr(unknown) in file.trace.provenance["malformed_reasons"][0]


def test_who_speaks_after_the_first_round_does_not_matter(loaded, tokenizer):
    file = loaded(json.dumps([chat(("human", "a"), ("gpt", "b"), ("alien", "c"))]), tokenizer=tokenizer)
    assert (file.prompts, file.bad) == ([2], [])


def test_chats_without_a_round_are_counted_apart(loaded, tokenizer):
    chats = [chat(("human", "a"), ("gpt", "b")), chat(("human", "a")), chat(), chat(("gpt", "a"), ("human", "b"))]
    file = loaded(json.dumps(chats), tokenizer=tokenizer)
    assert (file.read, file.trace.provenance["without_request"], file.bad) == (4, 3, [])


def test_messages_say_the_same(loaded, tokenizer):
    turns = [("system", "be kind"), ("user", "one two"), ("assistant", "three")]
    record = {"messages": [{"role": who, "content": text} for who, text in turns]}
    pictures = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]}
    file = loaded("\n".join(map(json.dumps, [record, pictures, record])), tokenizer=tokenizer)
    assert (file.prompts, file.bad) == ([3, 3], [2])


def test_real_conversations_keep_their_counts(shared, tokenizer, loaded):
    file = loaded(shared("data/sharegpt_sample.json").read_bytes(), tokenizer=tokenizer)
    assert (file.read, len(file.trace), file.trace.provenance["without_request"], file.bad) == (147, 144, 3, [])

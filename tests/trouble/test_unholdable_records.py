"""Whatever a record raises on its way into the trace makes it a bad record with its number, and the others are read."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.errors import UserError
from kvarena.harness.trace import texts

GOOD = '{"prompt_tokens": 7, "output_tokens": 2}'
CHAT = '{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}'

BAD_LENGTHS = {
    "nested 3,000 deep": '{"a":' * 3000 + "1" + "}" * 3000,
    "nested as deep as can be read": '{"prompt_tokens": ' + "[" * 900 + "]" * 900 + ', "output_tokens": 2}',
    "lists 100,000 deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + ', "prompt_tokens": 7, "output_tokens": 2}',
    "10 to the 400": f'{{"prompt_tokens": {10**400}, "output_tokens": 2}}',
    "5,000 digits": f'{{"prompt_tokens": {"9" * 5000}, "output_tokens": 2}}',
    "beyond a float": '{"prompt_tokens": 1e999, "output_tokens": 2}',
    "NaN": '{"prompt_tokens": NaN, "output_tokens": 2}',
    "-Infinity": '{"prompt_tokens": 7, "output_tokens": -Infinity}',
    "a key twice": '{"prompt_tokens": 7, "prompt_tokens": 8, "output_tokens": 2}',
    "an object": '{"prompt_tokens": {"n": 7}, "output_tokens": 2}',
    "a list": '{"prompt_tokens": [7], "output_tokens": 2}',
    "no object": '"prompt_tokens, output_tokens"',
}
BAD_TEXTS = {
    "half of an emoji": '{"conversations": [{"from": "human", "value": "\\ud83d b"}, {"from": "gpt", "value": "c"}]}',
    "half of an emoji, answered": CHAT.replace('"c"', '"\\udc4d"'),
    "a speaker of no text": CHAT.replace('"gpt"', '"\\ud83d"'),
    "no list": '{"conversations": {"from": "human", "value": "a"}}',
    "lists of lists": '{"conversations": [[["human", "a"]]]}',
    "turns 3,000 deep": '{"conversations": ' + "[" * 3000 + "]" * 3000 + "}",
}
NOT_UTF8 = {"latin-1": "é".encode("latin-1"), "cut within a letter": "€".encode()[:2], "a surrogate": b"\xed\xa0\xbd"}


@pytest.fixture(params=["array", "lines"])
def records(request):
    """The text of three records, as both kinds of JSON files have them."""
    return {"array": lambda *each: f"[{', '.join(each)}]", "lines": lambda *each: "\n".join(each)}[request.param]


@pytest.mark.parametrize("record", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_lengths_that_nothing_can_hold(loaded, records, record):
    file = loaded(records(GOOD, record, GOOD))
    assert (file.prompts, file.bad, file.read) == ([7, 7], [2], 3)


@pytest.mark.parametrize("record", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_texts_that_nothing_can_count(loaded, records, tokenizer, record):
    file = loaded(records(CHAT, record, CHAT), tokenizer=tokenizer)
    assert (file.prompts, file.bad, file.read) == ([3, 3], [2], 3)


@pytest.mark.parametrize("broken", NOT_UTF8.values(), ids=NOT_UTF8)
def test_bytes_that_are_no_text_cost_their_record(loaded, records, tokenizer, broken):
    file = loaded(
        records(CHAT, CHAT.replace("a b", "BYTES"), CHAT).encode().replace(b"BYTES", broken), tokenizer=tokenizer
    )
    assert (file.prompts, file.bad, file.read) == ([3, 3], [2], 3)
    file = loaded(b"note,prompt_tokens,output_tokens\nx,7,2\n" + broken + b",8,2\ny,9,2\n")
    assert (file.prompts, file.bad) == ([7, 9], [2])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_half_of_a_pair_costs_its_record_in_any_encoding(loaded, encoding):
    rows = "note,prompt_tokens,output_tokens\nx,7,2\n\ud83d,8,2\n\U0001f44d,9,2\n"
    file = loaded(rows.encode(encoding, "surrogatepass"))
    assert (file.prompts, file.bad) == ([7, 9], [2])


def test_what_is_not_taken_cannot_spoil_a_record(loaded, records, tokenizer):
    file = loaded(records(CHAT, '{"id": "\\ud83d", ' + CHAT[1:], CHAT), tokenizer=tokenizer)
    assert (file.prompts, file.bad) == ([3, 3, 3], [])
    assert loaded(records(GOOD, f'{{"note": [NaN, {10**400}], {GOOD[1:]}')).prompts == [7, 7]


BROKEN = {
    "no quote before a name": ('"prompt_tokens', "prompt_tokens"),
    "no quote behind a name": ('prompt_tokens"', "prompt_tokens"),
    "no colon": (": 7", " 7"),
    "no comma": (", ", " "),
    "no opening brace": ("{", ""),
    "no closing brace": ("}", ""),
    "no number": ("7", ""),
    "a quote too many": ("7", '7"'),
    "cut short": (GOOD[20:], ""),
}


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize(("old", "new"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_costs_itself_alone(loaded, records, old, new, place):
    three = [GOOD, GOOD, GOOD]
    three[place - 1] = GOOD.replace(old, new, 1)
    text = records(*three)
    if text[0] not in "[{":  # it does not begin like JSON, and no header of CSV begins so
        with pytest.raises(UserError, match="fit no format"):
            loaded(text)
    else:
        file = loaded(text)
        assert (file.prompts, file.bad, file.read) == ([7, 7], [place], 3)


def test_a_broken_chat_costs_none_of_the_others(loaded, tokenizer):
    broken = CHAT.replace('"human"', '"human')
    file = loaded(f"[{CHAT}, {broken}, {CHAT}, {CHAT}]", tokenizer=tokenizer)
    assert (file.prompts, file.bad, file.read) == ([3, 3, 3], [2], 4)  # its turns pass for no records


def moon(*ids):
    return {"timestamp": 0, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}


def test_ids_of_any_size_are_ids(loaded):
    ids = [(2**64 - 1, 2**63 + 2, 3), (2**64 - 1, 2**63 + 2, 4), (10**30, -(2**63) - 1), (3,)]
    file = loaded("\n".join(json.dumps(moon(*each)) for each in ids), keep_hash_ids=True)
    assert (file.read, file.bad) == (4, [])
    stated, kept = [id for each in ids for id in each], np.concatenate(file.trace.hash_ids)
    assert [a == b for a in stated for b in stated] == [a == b for a in kept for b in kept]
    assert [len(each) for each in file.trace.hash_ids] == [3, 3, 2, 1]


@pytest.mark.parametrize("ids", [["1"], [1.5], [True], [None], "1", None, {"1": 1}, [[1]]])
def test_ids_that_are_none(loaded, ids):
    records = [moon(1), {**moon(1), "hash_ids": ids}, moon(2)]
    file = loaded("\n".join(map(json.dumps, records)), keep_hash_ids=True)
    assert (file.read, file.bad) == (3, [2])


class Picky:
    """A tokenizer that raises at some words."""

    def __call__(self, batch, **keys):
        if any("unspeakable" in text for text in batch):
            raise KeyError("unspeakable")
        return {"input_ids": [text.split() for text in batch]}


def test_a_text_that_the_tokenizer_refuses(loaded, monkeypatch):
    monkeypatch.setattr(texts, "_BATCH", 3)
    monkeypatch.setattr("kvarena.harness.trace.reading.load_tokenizer", lambda name: Picky())
    chats = [CHAT, CHAT, CHAT.replace("a b", "unspeakable"), CHAT, CHAT.replace('"c"', '"unspeakable"'), CHAT, CHAT]
    file = loaded("\n".join(chats), tokenizer="picky")
    assert (file.prompts, file.bad, file.read) == ([2] * 5, [3, 5], 7)
    with pytest.raises(UserError, match="record 3: the tokenizer refuses its text: KeyError"):
        loaded("\n".join(chats), tokenizer="picky", on_bad_record="error")


def test_rows_of_parquet_that_are_no_records(loaded, tmp_path):
    columns = {"prompt_tokens": [1.0, None, float("nan"), 2.5, 5.0], "output_tokens": [1, 1, 1, 1, 1]}
    pq.write_table(pa.table(columns), tmp_path / "rows")
    file = loaded((tmp_path / "rows").read_bytes())
    assert (file.prompts, file.bad) == ([1, 5], [2, 3, 4])


def test_text_of_parquet_that_is_no_text(loaded, tmp_path):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    notes = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"prompt_tokens": [1, 2, 3], "output_tokens": [1, 1, 1], "note": notes}), tmp_path / "rows")
    file = loaded((tmp_path / "rows").read_bytes())
    assert (file.prompts, file.bad) == ([1, 3], [2])


@pytest.mark.parametrize(
    "stamp", ["1700-01-01", "2200-01-01", "9999-12-31", "0001-01-01", "2023-13-45", "now", "Today", ""]
)
def test_dates_that_are_centuries_away(loaded, stamp):
    rows = ["2023-11-16 18:15:46", stamp, "2023-11-16 18:15:48"]
    file = loaded("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{row},1,1\n" for row in rows))
    assert file.read == 3
    assert len(file.trace) + len(file.bad) == 3
    assert file.bad

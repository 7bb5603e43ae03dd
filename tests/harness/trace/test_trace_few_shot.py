"""WMT16 as text: an instruction and examples in front of every sentence, the German reference for the length."""

import json

import pytest

from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.few_shot import few_shot

PREFIXES = {"prefixes": {"1": {"text": "Translate:\na => b\n"}, "5": {"text": "Translate:\na => b\nc d => e\n"}}}


def pair(english, german):
    return {"translation": {"de": german, "en": english}}


def named(trace, **changes):
    """The trace of conf/trace/ of that name, with changes."""
    return typed(TraceConfig, {**load("trace", trace), **changes}, "trace")


@pytest.fixture
def wmt(tmp_path):
    """Writes sentences, and the prefixes beside them; gives the sentences' path."""

    def write(*lines, prefixes=PREFIXES):
        path = tmp_path / "wmt.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        (tmp_path / "wmt16_prefix.json").write_text(prefixes if isinstance(prefixes, str) else json.dumps(prefixes))
        return str(path)

    return write


@pytest.mark.parametrize(("name", "examples", "prefix"), [("wmt16_1shot", 1, 5), ("wmt16_5shot", 5, 9)])
def test_lengths(wmt, tokenizer, name, examples, prefix):
    path = wmt(pair("one two three", "eins zwei drei vier"), pair("", "x"))
    trace = load_trace(named(name, path=path, tokenizer=tokenizer))
    assert trace.prompt_tokens.tolist() == [prefix + 4, prefix + 1]  # prefix (with its BOS), sentence, =>
    assert trace.output_tokens.tolist() == [5, 2]  # BOS and the reference
    facts = {key: trace.provenance[key] for key in ("format", "examples", "prefix_tokens", "read", "malformed")}
    assert facts == {"format": "wmt16", "examples": examples, "prefix_tokens": prefix, "read": 2, "malformed": 0}


def test_a_prompt_to_the_letter(wmt):
    config = TraceConfig(path=wmt(), examples=5)
    assert few_shot(config).prompt("c.") == "Translate:\na => b\nc d => e\nc. =>"


def test_the_prefix_of_another_file(wmt, tokenizer, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"prefixes": {"2": {"text": "x "}}}))
    config = TraceConfig(path=wmt(pair("a", "b")), tokenizer=tokenizer, examples=2, prefix_path=str(other))
    assert load_trace(config).prompt_tokens.tolist() == [4]  # BOS x a =>
    other.write_text(json.dumps({"prefixes": {"2": {"text": "x y z "}}}))
    assert load_trace(config).prompt_tokens.tolist() == [6], "a changed prefix is read again"


BAD = [
    ("{", "not JSON"),
    ({"translation": "a"}, "translation is 'a', not a sentence by language"),
    ({"translation": {"de": "x"}}, "no field en"),
    ({"translation": {"de": None, "en": "x"}}, "de is None, not text"),
    ({"text": "x"}, "no field translation"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_stops_the_load(wmt, tokenizer, line, reason):
    path = wmt(pair("a", "b"), line, pair("c", "d"))
    with pytest.raises(UserError) as error:
        load_trace(named("wmt16_1shot", path=path, tokenizer=tokenizer))
    assert f"{path}, record 2: {reason}" in str(error.value)


def test_bad_lines_are_skipped_and_counted(wmt, tokenizer):
    path = wmt(pair("a", "b"), *(line for line, _ in BAD), pair("c d", "e"))
    trace = load_trace(named("wmt16_1shot", path=path, tokenizer=tokenizer, on_bad_record="skip"))
    assert trace.prompt_tokens.tolist() == [7, 8]
    assert (trace.provenance["read"], trace.provenance["malformed"]) == (7, 5)


@pytest.mark.parametrize(
    ("changes", "prefixes", "reason"),
    [
        ({"examples": None}, PREFIXES, "set trace.examples to their number"),
        ({"examples": 3}, PREFIXES, r"trace\.examples=3: .*wmt16_prefix\.json has prefixes of 1, 5 examples"),
        ({"prefix_path": "/nowhere.json"}, PREFIXES, r"trace\.prefix_path: /nowhere\.json: no such file"),
        ({}, "{", r"trace\.prefix_path: .*wmt16_prefix\.json: cannot be read"),
        ({}, [], "prefixes: must be an object"),
        ({}, {"prefixes": {"1": {"text": ""}}}, r"prefixes\.1\.text: must be the text"),
        ({"tokenizer": None}, PREFIXES, r"holds wmt16 text.*trace=wmt16_1shot"),
    ],
)
def test_refusals(wmt, tokenizer, changes, prefixes, reason):
    path = wmt(pair("a", "b"), prefixes=prefixes)
    with pytest.raises(UserError, match=reason):
        load_trace(named("wmt16_1shot", **{"path": path, "tokenizer": tokenizer} | changes))

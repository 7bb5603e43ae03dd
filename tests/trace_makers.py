"""Records of every format of traces, and what each one states.

Nothing here is the loader's: the fields and units are those of docs/traces.md, written down a second time.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import pandas as pd

T = TypeVar("T")
Record = dict[str, object]
LONGEST = 2**31 - 1  # tokens
PLAIN_COUNT = re.compile(r"[1-9][0-9]{0,8}")
PLAIN_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
PLAIN_DATE = re.compile(r"20\d\d-[01]\d-[0-3]\d \d\d:\d\d:\d\d\.\d{6,7}(\+00:00)?")
DATE = 0.0  # in place of a unit: stamps are dates
SPEAKERS = {"human": "human", "user": "human", "system": "system"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"
)
PREFIX = "Translate . "  # what prompts of wmt16 begin with


class Pick(Protocol):
    """Chooses one of several: hypothesis in the tests, a seeded generator in the benchmark."""

    def __call__(self, options: Sequence[T], /) -> T: ...


class Stated(NamedTuple):
    """What a record says of its request."""

    prompt: int
    output: int
    stamp: float | None = None  # in the file's unit; of a date, seconds since 1970
    ids: tuple[int, ...] | None = None
    conversation: str = ""


class Verdict(NamedTuple):
    """What must become of a record, and, where it may be kept, with what."""

    fate: str  # of {"kept", "either", "bad", "dropped"}; either: kept with these values, or not
    stated: Stated | None = None


BAD = Verdict("bad")
DROPPED = Verdict("dropped")


@dataclass(frozen=True)
class Kind:
    """A format: which fields every record has, how one is made, and what one states."""

    name: str  # of trace.format
    required: tuple[str, ...]
    make: Callable[[Pick, int], Record]  # the record of that number
    verdict: Callable[[Mapping[str, object], bool], Verdict]  # of a record; whether its fields are text, as in a CSV
    in_csv: bool = True
    told_by: tuple[str, ...] = ()  # further fields that it has where nobody names it
    unit: float = 1  # of its stamps, in seconds, or DATE
    from_first: bool = False  # the first of the kept arrives at 0
    shared: bool = False  # its fields are other formats' too


@dataclass(frozen=True)
class Fields:
    """The names of what a format of lengths states."""

    prompt: str
    output: str
    stamp: str
    needed: bool = True  # the stamp
    zero_fails: bool = False  # no token of output is a request that failed
    block: int = 0  # tokens of an id of hash_ids; 0: it has none


def count(value: object, text: bool) -> tuple[int | None, bool]:
    """(the number of tokens that a field states if any, whether it is written as anybody would)."""
    if text:
        plain = PLAIN_COUNT.fullmatch(str(value)) is not None
        try:
            number = float(str(value))
        except ValueError:
            return None, False
    elif isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LONGEST:
        return None, False
    else:
        number, plain = float(value), isinstance(value, int)
    whole = math.isfinite(number) and number == int(number) and 0 <= number <= LONGEST
    return (int(number) if whole else None), plain and whole


def number_of(value: object, text: bool, from_first: bool) -> tuple[float | None, bool]:
    """(a stamp, if a field states one, whether it is written as anybody would)."""
    if not text and (isinstance(value, bool) or not isinstance(value, int | float)):
        return None, False
    try:
        number = float(str(value))
    except ValueError:
        return None, False
    plain = PLAIN_NUMBER.fullmatch(str(value)) is not None
    return (number, plain) if math.isfinite(number) and (from_first or number >= 0) else (None, False)


def date(value: object) -> tuple[float | None, bool]:
    """(seconds since 1970 of a date, whether it is written as in Azure's files)."""
    plain = PLAIN_DATE.fullmatch(str(value)) is not None
    if number_of(value, isinstance(value, str), True)[0] is not None:
        return None, False  # of a unit that nobody says
    try:
        stamp = datetime.fromisoformat(str(value)) if plain else pd.to_datetime(value, format="ISO8601", utc=True)
        return (None, False) if pd.isna(stamp) else (stamp.replace(tzinfo=stamp.tzinfo or UTC).timestamp(), plain)
    except (ValueError, TypeError, OverflowError):
        return None, False


def states_lengths(record: Mapping[str, object], text: bool, fields: Fields, unit: float, from_first: bool) -> Verdict:
    """Of a record that states token counts."""
    prompt, prompt_plain = count(record[fields.prompt], text)
    output, output_plain = count(record[fields.output], text)
    failed = fields.zero_fails and output == 0
    if not prompt or not (output or failed):
        return BAD
    plain, stamp, value = prompt_plain and output_plain, None, record.get(fields.stamp)
    blank = value is None or value != value or (text and not str(value).strip())  # a NaN of parquet is no time
    if not blank:
        stamp, stamp_plain = date(value) if unit == DATE else number_of(value, text, from_first)
        plain = plain and stamp_plain
        if stamp is None:
            return Verdict("either") if failed else BAD
    elif fields.needed or fields.stamp in record:
        plain = False
    ids = record.get("hash_ids")
    if text and ids:
        try:
            ids = json.loads(str(ids))
        except (ValueError, RecursionError):
            ids = "no list"
    if isinstance(ids, list) and all(type(each) is int for each in ids):
        plain = plain and len(ids) == -(-prompt // (fields.block or 512))
    elif fields.block or "hash_ids" in record:
        ids, plain = None, False
    conversation = record.get("conversation_id") or ""
    plain = plain and isinstance(conversation, str)
    if failed:
        return DROPPED if plain else Verdict("either")
    stated = Stated(prompt, output, stamp, None if ids is None else tuple(ids), str(conversation).strip())
    return Verdict("kept" if plain else "either", stated)


def lengths(
    name: str,
    fields: Fields,
    unit: float,
    extra: Callable[[Pick, int], Record],
    from_first: bool = False,
    **more: object,
) -> Kind:
    """A format that states token counts. extra: further fields, by the prompt's tokens."""

    def make(pick: Pick, number: int) -> Record:
        milliseconds = number * 5000 + pick(range(1, 5000))
        stamp: object = milliseconds if unit == 0.001 else milliseconds / 1000
        if unit == DATE:
            moment = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
            stamp = f"{moment:%Y-%m-%d %H:%M:%S.%f}" + pick(("0", "+00:00"))
        tokens = {
            fields.prompt: number * 4000 + pick(range(1, 3000)),
            fields.output: pick((0, 5, 80) if fields.zero_fails else range(1, 500)),
        }
        return {fields.stamp: stamp, **tokens, **extra(pick, tokens[fields.prompt])}

    required = (fields.prompt, fields.output, fields.stamp)[: 3 if fields.needed else 2]

    def verdict(record: Mapping[str, object], text: bool) -> Verdict:
        return states_lengths(record, text, fields, unit, from_first)

    return Kind(name, required, make, verdict, unit=unit, from_first=from_first, **more)  # type: ignore[arg-type]


def texts(name: str, required: tuple[str, ...], make: Callable[[Pick], Record], sides: Callable[..., object]) -> Kind:
    """A format that states text; a word is a token, behind one BOS. sides: (prompt, output), None, or raises."""

    def verdict(record: Mapping[str, object], text: bool) -> Verdict:
        try:
            found = sides(record)
        except (KeyError, TypeError, IndexError, AttributeError):
            return BAD
        if found is None:
            return DROPPED
        if not isinstance(found, tuple) or not all(isinstance(side, str) for side in found):
            return BAD
        return Verdict("kept", Stated(*(len(side.split()) + 1 for side in found)))

    return Kind(name, required, lambda pick, number: make(pick), verdict, in_csv=False)


def words(pick: Pick) -> str:
    """Some words, with what has a meaning in one container or another."""
    return " ".join(pick(('say "it"', "a, b", "x", "[y]", "{z", "häßlich")) for _ in range(pick(range(1, 6))))


def _first_round(turns: str, speaker: str, text: str, record: Mapping[str, list[Mapping[str, str]]]) -> object:
    """A question and the answer right behind it. Raises KeyError for a speaker before them whom nobody knows."""
    for before, turn in zip([{}, *record[turns]], record[turns], strict=False):
        answers = SPEAKERS[turn[speaker].lower()] == "assistant"
        if answers and SPEAKERS.get(str(before.get(speaker)).lower()) == "human":
            return before[text], turn[text]
    return None


def _sharegpt(pick: Pick) -> Record:
    speakers = pick((("human", "gpt"), ("gpt", "human", "model"), ("system", "User", "Assistant"), ("human",), ()))
    return {"id": "x", "conversations": [{"from": who, "value": words(pick)} for who in speakers]}


def _messages(pick: Pick) -> Record:
    speakers = pick((("user", "assistant"), ("system", "user", "assistant"), ("user", "user"), ("system",)))
    return {"messages": [{"role": who, "content": words(pick)} for who in speakers]}


def _ids(block: int) -> Callable[[Pick, int], Record]:
    def make(pick: Pick, prompt: int) -> Record:
        first = pick((0, 7, 2**40))
        return {"hash_ids": list(range(first, first - (-prompt // block)))}

    return make


def _bailian(pick: Pick, prompt: int) -> Record:
    return {"chat_id": pick(range(9)), "parent_chat_id": -1, "type": "text", "turn": 1, **_ids(16)(pick, prompt)}


_STAMPED = ("input_length", "output_length", "timestamp")
_GUIDE = Fields("prompt_tokens_count", "output_tokens_count", "timestamp", needed=False)
_BURST = Fields("Request tokens", "Response tokens", "Timestamp", zero_fails=True)
KINDS = (  # in the order in which a file's fields are compared with them
    texts("sharegpt", ("conversations",), _sharegpt, partial(_first_round, "conversations", "from", "value")),
    texts(
        "alpaca",
        ("instruction", "output"),
        lambda pick: {"instruction": words(pick), "input": words(pick), "output": words(pick)},
        lambda record: (record["instruction"] + " " + record.get("input", ""), record["output"]),
    ),
    texts(
        "wmt16",
        ("translation",),
        lambda pick: {"translation": {"en": words(pick), "de": words(pick)}},
        lambda record: (PREFIX + record["translation"]["en"] + " =>", record["translation"]["de"]),
    ),
    texts("sharegpt", ("messages",), _messages, partial(_first_round, "messages", "role", "content")),
    lengths("azure", Fields("ContextTokens", "GeneratedTokens", "TIMESTAMP"), DATE, lambda *_: {}, from_first=True),
    lengths("azure", Fields("prompt_tokens", "output_tokens", "arrival_s"), 1, lambda *_: {}),
    lengths(
        "bailian", Fields(*_STAMPED, block=16), 1, _bailian,
        told_by=("chat_id", "parent_chat_id"),
    ),
    lengths("mooncake", Fields(*_STAMPED, block=512), 0.001, _ids(512), told_by=("hash_ids",), shared=True),
    lengths("guidellm", Fields(*_STAMPED), 1, lambda *_: {}, from_first=True, shared=True),
    lengths("guidellm", _GUIDE, 1, lambda *_: {}, from_first=True),
    lengths("burstgpt", _BURST, 1, lambda *_: {"Model": "ChatGPT", "Log Type": "API log"}, from_first=True),
    lengths("vidur", Fields("num_prefill_tokens", "num_decode_tokens", "arrived_at", False), 1, lambda *_: {}),
    lengths("splitwise", Fields("prompt_size", "token_size", "arrival_timestamp", False), 1, lambda *_: {"batch": 1}),
    lengths(
        "lengths", Fields("prompt_tokens", "output_tokens", "arrival_s", False), 1,
        lambda pick, _: {"note": words(pick), "conversation_id": pick(("", "a", "b"))},
    ),
)  # fmt: skip


def fitting(fields: Sequence[str], name: str | None) -> Kind | None:
    """The first kind whose fields these are."""
    for kind in KINDS:
        needed = {*kind.required, *(kind.told_by if name is None else ())}
        if name in (None, kind.name) and needed <= set(fields):
            return kind
    return None

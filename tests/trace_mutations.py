"""A file of a trace with one thing wrong with it, or with nothing."""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trace_containers import write_csv, write_json, write_parquet
from trace_makers import DATE, KINDS, Kind, Pick, Record

TEXT = (
    "soon",
    " ",
    "1_0",
    "0x10",
    "12abc",
    "1e3",
    "nan",
    "inf",
    "-5",
    "0",
    "2.5",
    "+7",
    " 8 ",
    "1e400",
    str(2**63),
    "½",
)
WRONG: tuple[object, ...] = (
    *TEXT,
    None,
    True,
    -1,
    0,
    2.5,
    7.0,
    10**30,
    10**400,
    1e300,
    float("nan"),
    [],
    [1],
    {},
    {"a": 1},
)


@dataclass(frozen=True)
class TraceFile:
    """What a loader is given, and how the file was made."""

    kind: Kind
    container: str
    mutation: str
    content: bytes
    format: str | None  # trace.format
    keep_hash_ids: bool = False
    time_unit: str | None = None  # trace.time_unit

    def __repr__(self) -> str:
        given = f"format={self.format}, time_unit={self.time_unit}"
        return f"{self.kind.name} {self.container}, {self.mutation}, {given}: {self.content!r}"


# Of records: (records, kind, pick) -> what the file holds in their place.


def _field(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    record = pick(records)
    record[pick(list(record))] = pick(WRONG)
    return [*records]


def _missing(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    record = pick(records)
    del record[pick(list(record))]
    return [*records]


def _swapped(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    """One record's values stand under one another's names."""
    record = pick(records)
    one, other = pick(list(record)), pick(list(record))
    record[one], record[other] = record[other], record[one]
    return [*records]


def _named_wrongly(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    """Two columns' names are swapped."""
    one, other = pick(list(records[0])), pick(list(records[0]))
    names = {one: other, other: one}
    return [{names.get(key, key): value for key, value in record.items()} for record in records]


def _reordered(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    return [dict(reversed(record.items())) for record in records]


def _doubled(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    at = pick(range(len(records)))
    return [*records[: at + 1], *records[at:]]


def _deleted(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    at = pick(range(len(records)))
    return [*records[:at], *records[at + 1 :]]


def _foreign(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    """Something that is no record, or one of another format."""
    other = pick((None, 5, "x", [], [1, 2], {}, {"a": {"b": 1}}, pick(KINDS).make(pick, 0)))
    at = pick(range(len(records) + 1))
    return [*records[:at], other, *records[at:]]


def _nested(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    """A record within others, or a value of it."""
    at, depth = pick(range(len(records))), pick((1, 2, 50))
    wrap = pick((lambda value: [value], lambda value: {"data": value}))
    inner: object = records[at]
    key = pick((None, *records[at]))
    if key is not None:
        inner = records[at][key]
    for _ in range(depth):
        inner = wrap(inner)
    changed = inner if key is None else {**records[at], key: inner}
    return [*records[:at], changed, *records[at + 1 :]]


def _other_unit(records: list[Record], kind: Kind, pick: Pick) -> list[object]:
    """Stamps count in something else."""
    factor = pick((1000, 0.001, 10**9))
    fields = [key for key, value in records[0].items() if isinstance(value, float) or key.lower() == "timestamp"]
    for record in records:
        for key in fields:
            value = record[key]
            record[key] = value * factor if isinstance(value, int | float) else 1700158546 * factor
    return [*records]


RECORDS = {
    "another unit": _other_unit,
    "a wrong value": _field,
    "a field missing": _missing,
    "values swapped": _swapped,
    "names swapped": _named_wrongly,
    "fields reordered": _reordered,
    "a record doubled": _doubled,
    "a record deleted": _deleted,
}
JSON_RECORDS = {"something else": _foreign, "nested": _nested}


# Of text: (text, pick) -> text.


def _insert(text: str, at: int, what: str) -> str:
    return text[:at] + what + text[at:]


def _anywhere(what: str) -> Callable[[str, Pick], str]:
    return lambda text, pick: _insert(text, pick(range(len(text) + 1)), what)


def _without(what: str) -> Callable[[str, Pick], str]:
    def drop(text: str, pick: Pick) -> str:
        places = [at for at, letter in enumerate(text) if letter == what]
        if not places:
            return text
        at = pick(places)
        return text[:at] + text[at + 1 :]

    return drop


def _line(change: Callable[[Sequence[str], int], Sequence[str]]) -> Callable[[str, Pick], str]:
    def mutate(text: str, pick: Pick) -> str:
        lines = text.split("\n")
        return "\n".join(change(lines, pick(range(len(lines)))))

    return mutate


def _digit(text: str, pick: Pick) -> str:
    at = pick(range(len(text)))
    return text[:at] + pick("09.-,\" {}[]:e\t;'") + text[at + 1 :]


TEXTS: dict[str, Callable[[str, Pick], str]] = {
    "a quote added": _anywhere('"'),
    "a quote dropped": _without('"'),
    "a comma added": _anywhere(","),
    "a comma dropped": _without(","),
    "a line break added": _anywhere("\n"),
    "a line break dropped": _without("\n"),
    "NUL": _anywhere("\0"),
    "half a character": _anywhere("\\ud83d"),
    "CRLF": lambda text, pick: text.replace("\n", "\r\n"),
    "a carriage return": _anywhere("\r"),
    "a letter replaced": _digit,
    "cut off": lambda text, pick: text[: pick(range(len(text)))],
    "beginning lost": lambda text, pick: text[pick(range(len(text))) :],
    "blank lines": _line(lambda lines, at: [*lines[:at], "", "", *lines[at:]]),
    "a line doubled": _line(lambda lines, at: [*lines[:at], lines[at], *lines[at:]]),
    "a line deleted": _line(lambda lines, at: [*lines[:at], *lines[at + 1 :]]),
    "first line again": _line(lambda lines, at: [*lines[:at], lines[0], *lines[at:]]),
    "trailing comma": _line(lambda lines, at: [*lines[:at], lines[at] + ",", *lines[at + 1 :]]),
    "trailing commas": _line(lambda lines, at: [line and line + "," for line in lines]),
    "a line of words": _line(lambda lines, at: [*lines[:at], "# total, 5 rows", *lines[at:]]),
    "no end of line": lambda text, pick: text.rstrip("\n"),
}


# Of bytes: (text, pick) -> bytes.


def _flipped(content: bytes, pick: Pick) -> bytes:
    if not content:
        return content
    at = pick(range(len(content)))
    return content[:at] + bytes([content[at] ^ 1 << pick(range(8))]) + content[at + 1 :]


def _byte_lost(content: bytes, pick: Pick) -> bytes:
    at = pick(range(len(content)))
    return content[:at] + content[at + 1 :]


BYTES: dict[str, Callable[[bytes, Pick], bytes]] = {
    "a bit flipped": _flipped,
    "a byte lost": _byte_lost,
    "truncated": lambda content, pick: content[: pick(range(len(content)))],
    "NUL bytes behind": lambda content, pick: content + b"\0" * pick((1, 5)),
}
ENCODINGS = ("utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-32")


def mutations(container: str) -> tuple[str, ...]:
    """What can be done to a file; one is left as it is more often than not."""
    of_text = (*TEXTS, *BYTES, *ENCODINGS)
    more = {"csv": of_text, "parquet": ("nested", "truncated")}.get(container, (*JSON_RECORDS, *of_text))
    return ("none", "none", "none", *RECORDS, *more)


def trace_file(pick: Pick, mutation: str | None = None, kind: Kind | None = None) -> TraceFile:
    """A file of that kind with that mutation (`none`: a valid one), or of what is picked."""
    kind = kind or pick(KINDS)
    container = pick(("csv", "json", "jsonl", "parquet") if kind.in_csv else ("json", "jsonl", "parquet"))
    zipped = container != "parquet" and pick((False, False, True))
    mutation = mutation or pick(mutations(container))
    records: list[object] = [kind.make(pick, number) for number in range(pick((1, 2, 3, 3, 4, 5)))]
    change = (RECORDS | JSON_RECORDS).get(mutation)
    if change:
        records = change(records, kind, pick)  # type: ignore[arg-type]
    content = _written(records, container, mutation, pick)
    if zipped:
        content = gzip.compress(content, 1)
    if mutation in BYTES and content:
        content = BYTES[mutation](content, pick)
    has_ids, has_clock = kind.name in ("mooncake", "bailian"), kind.in_csv and kind.unit != DATE
    alike = mutation != "something else"
    return TraceFile(
        kind,
        container + (".gz" if zipped else ""),
        mutation,
        content,
        format=pick((None, kind.name)),
        keep_hash_ids=has_ids and alike and pick((False, True)),
        time_unit=pick((None, None, None, "s", "ms")) if has_clock and alike else None,
    )


def _written(records: list[object], container: str, mutation: str, pick: Pick) -> bytes:
    if container == "parquet":
        return write_parquet(records) or write_parquet([{"a": 1}]) or b""  # type: ignore[arg-type]
    if container == "csv":
        text = write_csv(records, pick((False, False, True)), pick(",,,;\t|"))  # type: ignore[arg-type]
    else:
        text = write_json(records, container == "jsonl", pick((None, 1)))
    if mutation in TEXTS and text:
        text = TEXTS[mutation](text, pick)
    return text.encode(mutation if mutation in ENCODINGS else "utf-8")

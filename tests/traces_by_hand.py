"""What must become of each record of a file, read here piece by piece and by no part of the loader.

A CSV's records are its lines below the first, none of them blank. Those of JSON lines are its lines, or as many lines
as together are one value. Those of a JSON array are its elements, as far as they can be told apart.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
from trace_makers import BAD, Kind, Verdict, fitting
from trace_mutations import TraceFile

LONGEST_S = 104 * 86400  # of a trace
UNITS = {"s": 1, "ms": 0.001}
BROKEN = object()  # a record that cannot be read


class Doubtful(dict[str, object]):
    """A record that may be read, or refused for how it is written."""


class Content(NamedTuple):
    """The records of a file, as they stand in it."""

    records: Sequence[object] = ()  # mappings of fields, other values of JSON, or BROKEN
    fields: list[str] | None = None  # of a CSV's header; None: no CSV
    readable: bool = True  # False: the file as a whole may be refused
    beyond: Sequence[object] | None = None  # of a JSON array that is broken: objects that stand behind `records`


class Expected(NamedTuple):
    """What a loader must make of a file."""

    verdicts: list[Verdict]  # of each record
    kind: Kind | None  # None: nothing in it fits a format
    may_refuse: bool  # the load as a whole, whatever trace.on_bad_record says
    beyond: list[Verdict] | None = None  # behind them is something broken: one bad record at least, and maybe these
    unit: float = 1  # of its stamps, in seconds


def expected(file: TraceFile) -> Expected:
    """The verdict on each record of a file."""
    found = _content(file.content, file.format)
    kind = _kind(found, file.format)
    if kind is None:
        return Expected([], None, True)
    text = found.fields is not None
    verdicts = [_verdict(record, kind, text) for record in found.records]
    beyond = None if found.beyond is None else [_verdict(record, kind, text) for record in found.beyond]
    timed = [each.fate for each in (*verdicts, *(beyond or ())) if each.stated and each.stated.stamp is not None]
    if timed:
        verdicts = [_untimed(each, "kept" in timed) for each in verdicts]
    verdicts = _turns(verdicts)
    stamps = [each.stated.stamp for each in (*verdicts, *(beyond or ())) if each.stated and each.stated.stamp]
    unit, sure = (UNITS[file.time_unit], bool(stamps)) if file.time_unit else _unit(kind, stamps, file.format)
    if kind.from_first:
        verdicts = [_if_timely(each, stamps, LONGEST_S / unit) for each in verdicts]
    kept = [each.stated for each in verdicts if each.fate == "kept" and each.stated]
    has_what_is_asked = any(not file.keep_hash_ids or each.ids is not None for each in kept)
    return Expected(verdicts, kind, not (sure and found.readable and has_what_is_asked), beyond, unit)


def _untimed(verdict: Verdict, sure: bool) -> Verdict:
    """Bad where it has no time: others have one, or may have."""
    if verdict.stated is None or verdict.stated.stamp is not None:
        return verdict
    return BAD if sure else Verdict("either", verdict.stated)


def _if_timely(verdict: Verdict, stamps: Sequence[float], longest: float) -> Verdict:
    """Doubtful where the clock says what most of the file's does not: nobody knows which are right."""
    if verdict.stated is None or verdict.stated.stamp is None:
        return verdict
    near = sum(abs(stamp - verdict.stated.stamp) < longest for stamp in stamps)
    return verdict if 2 * near > len(stamps) else Verdict("either", verdict.stated)


def _unit(kind: Kind, stamps: Sequence[float], format_name: str | None) -> tuple[float, bool]:
    """Seconds of a stamp's unit, and whether it can be told: where most have fractions, they are seconds."""
    fractions = sum(stamp % 1 != 0 for stamp in stamps)
    if not kind.shared or not stamps:
        return kind.unit or 1, True
    if format_name is None:
        unit = 1 if 2 * fractions > len(stamps) else kind.unit
        return unit, fractions == len(stamps) or (not fractions and unit < 1)
    return kind.unit, kind.unit == 1 or not fractions


def _turns(verdicts: list[Verdict]) -> list[Verdict]:
    """A turn of a conversation is bad whose prompt does not hold what was said before it."""
    turns = [(number, each) for number, each in enumerate(verdicts) if each.stated and each.stated.conversation]
    turns.sort(key=lambda turn: turn[1].stated.stamp or 0)
    said: dict[str, int] = {}
    doubtful = {each.stated.conversation for _, each in turns if each.fate != "kept"}
    for number, each in turns:
        stated = each.stated
        if stated.conversation in doubtful:
            verdicts[number] = Verdict("either", stated)
        elif stated.prompt < said.get(stated.conversation, 0):
            verdicts[number] = BAD
        else:
            said[stated.conversation] = stated.prompt + stated.output
    return verdicts


def _kind(content: Content, format_name: str | None) -> Kind | None:
    """By the header, else by the first record that fits any."""
    if content.fields is not None:
        kind = fitting(content.fields, format_name)
        return kind if kind and kind.in_csv else None
    records = (record for record in (*content.records, *(content.beyond or ())) if isinstance(record, Mapping))
    return next((kind for record in records if (kind := fitting([*record], format_name))), None)


def _verdict(record: object, kind: Kind, text: bool) -> Verdict:
    if not isinstance(record, Mapping) or not set(kind.required) <= set(record):
        return BAD
    verdict = kind.verdict(record, text)
    return Verdict("either", verdict.stated) if isinstance(record, Doubtful) else verdict


def _content(content: bytes, format_name: str | None) -> Content:
    if content.startswith(b"PAR1"):
        try:
            return Content(pa.parquet.read_table(io.BytesIO(content)).to_pylist())
        except (pa.ArrowException, OSError, ValueError):
            return Content(readable=False)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error):
            return Content(readable=False)
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding, errors="surrogateescape" if "utf-8" in encoding else "surrogatepass")
    except UnicodeDecodeError:
        return Content(readable=False)
    readable = "utf-8" in encoding or content.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = re.sub(r"\r\n|\r", "\n", text)
    if text.lstrip()[:1] == "[":
        return _array(text)._replace(readable=readable)
    lines = [line for line in text.split("\n") if line.strip()]
    if text.lstrip()[:1] == "{":
        return Content(list(_values(lines)), readable=readable)
    table = _table(lines, format_name)
    return table._replace(readable=readable and table.readable)


def _table(lines: Sequence[str], format_name: str | None) -> Content:
    """Of a CSV, by the first separator with which its header fits a format."""
    headers = {each: next(csv.reader(lines[:1], delimiter=each), []) for each in ",;\t|"}
    separator = next((each for each, names in headers.items() if fitting([*map(str.strip, names)], format_name)), ",")
    names = [name.strip() for name in headers[separator]]
    rows = [_fields(line, separator) for line in lines[1:]]
    return Content(
        [
            type(row)(zip(names, row.values(), strict=True)) if row and len(row) == len(names) else BROKEN
            for row in rows
        ],
        names,
        readable=not re.search("[\0\ud800-\udfff]", lines[0] if lines else ""),
    )


def _fields(line: str, separator: str) -> dict[int, object] | None:
    """Of one line of a CSV, by place; None where a quote does not close on it."""
    if line.count('"') % 2:
        return None
    odd = re.search("[\ud800-\udfff]", line)  # what cannot be decoded
    try:
        fields = next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        fields, odd = next(csv.reader([line], delimiter=separator)), True
    return (Doubtful if odd else dict)(enumerate(fields))


def _loads(text: str) -> object:
    """The value; broken where a name stands twice in an object, doubtful where it cannot be written again."""

    def once(pairs: list[tuple[str, object]]) -> object:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return BROKEN
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a character
        doubt = isinstance(value, list) and [Doubtful(each) if isinstance(each, dict) else each for each in value]
        return doubt or (Doubtful(value) if isinstance(value, dict) else value)
    return value


def _values(lines: Sequence[str]) -> Iterator[object]:
    """Of JSON lines: of a line, or of as many as it takes; a line with which that does not begin is broken."""
    at = 0
    while at < len(lines):
        ends = (end for end in range(at + 1, len(lines) + 1) if _loads("\n".join(lines[at:end])) is not BROKEN)
        end = next(ends, None)
        yield BROKEN if end is None else _loads("\n".join(lines[at:end]))
        at = end or at + 1


def _array(text: str) -> Content:
    """Elements of an array; of a broken one, the most that stand before a place where it could have ended."""
    whole = _loads(text)
    if isinstance(whole, list):
        return Content(whole)
    ends = [0, *(at for at, letter in enumerate(text) if letter == ","), len(text.rstrip())]
    read = {end: value for end in ends if isinstance(value := _loads(text[:end] + "]"), list)}
    end = max(read, default=0)
    return Content(read.get(end, []), beyond=list(_objects(text[end:])))


def _objects(text: str) -> Iterator[object]:
    """Objects that stand in a text, wherever they do."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        ends = (end + 1 for end in range(at, len(text)) if text[end] == "}")
        found = ((end, value) for end in ends if (value := _loads(text[at:end])) is not BROKEN)
        end, value = next(found, (at + 1, None))
        if isinstance(value, Mapping):
            yield Doubtful(value)
        at = end

"""Records of JSON text: an array of objects, one object after another, or an object that wraps an array of them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from kvarena.harness.files.text_file import check_text

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*([,\]]?)\s*")
_OBJECT = re.compile(r'\{(?=\s*")')  # with a name in it; a brace within a text hardly ever looks so
_UNREADABLE = (ValueError, RecursionError)  # nested too deep


def json_records(
    text: str, bad: Callable[[int, str], None], is_record: Callable[[Any], bool]
) -> Iterator[tuple[int, Any]]:
    """(record number from 1, value) of every record that can be read; the others go to `bad`, with a reason.

    is_record: whether a value looks like a record; past one that is broken, the next that does is found by it.
    """
    start = _past_space(text, 0)
    if text.startswith("[", start):
        return _array(text, start + 1, bad, is_record)
    wrapped = _wrapped(text, start, is_record)
    return _lines(text, bad) if wrapped is None else enumerate(wrapped, start=1)


def _wrapped(text: str, start: int, is_record: Callable[[Any], bool]) -> list[Any] | None:
    """The one list of records in the one object that the text is, if so it is."""
    try:
        value, end = _decode(text, start)
    except _UNREADABLE:
        return None
    if is_record(value) or _past_space(text, end) < len(text):
        return None
    lists = [each for each in value.values() if isinstance(each, list) and any(map(is_record, each))]
    return lists[0] if len(lists) == 1 else None


def _lines(text: str, bad: Callable[[int, str], None]) -> Iterator[tuple[int, Any]]:
    """One object per line, or printed over several lines."""
    number, start = 0, _past_space(text, 0)
    while start < len(text):
        number += 1
        end = _end_of_line(text, start)
        try:
            value, end = _record(text, start)
            check_text(text[start:end])
        except _UNREADABLE as error:
            bad(number, f"not JSON: {error}")
        else:
            yield number, value
        start = _past_space(text, end)


def _record(text: str, start: int) -> tuple[Any, int]:
    """The value that begins here, and where the line on which it ends does."""
    value, end = _decode(text, start)
    end_of_line = _end_of_line(text, end)
    if text[end:end_of_line].strip():
        raise ValueError(f"more stands behind it on its line: {text[end:end_of_line].strip()[:20]!r}")
    return value, end_of_line


def _array(
    text: str, start: int, bad: Callable[[int, str], None], is_record: Callable[[Any], bool]
) -> Iterator[tuple[int, Any]]:
    """Elements of an array. Past one that is broken, the next that looks like a record is the next."""
    at, number, mark = _past_space(text, start), 0, ","
    if text.startswith("]", at):
        at, mark = _past_space(text, at + 1), "]"
    while mark == ",":
        number += 1
        try:
            value, mark, end = _element(text, at)
        except _UNREADABLE as error:
            at, found = _next_record(text, at, is_record)
            lost = "" if found else "nothing from here on can be read: "
            bad(number, f"broken or truncated JSON, {lost}{error}")
            if not found:
                return
            continue
        try:
            check_text(text[at:end])
        except ValueError as error:  # nothing behind it is lost by that
            bad(number, str(error))
        else:
            yield number, value
        at = end
    if mark != "]" or at != len(text):
        bad(number + 1, f"broken or truncated JSON after record {number}: the array does not end there")


def _element(text: str, at: int) -> tuple[Any, str, int]:
    """The element that begins here, the mark behind it (empty where the text ends), and where what follows begins."""
    value, end = _decode(text, at)
    separator = _SEPARATOR.match(text, end)
    assert separator is not None  # the pattern matches the empty string too
    if not separator[1] and separator.end() < len(text):
        raise ValueError(f"neither a comma nor ] stands behind it, but {text[separator.end() :][:20]!r}")
    return value, separator[1], separator.end()


def _next_record(text: str, at: int, is_record: Callable[[Any], bool]) -> tuple[int, bool]:
    """Where the next object begins that looks like a record, and whether there is one."""
    for brace in _OBJECT.finditer(text, at + 1):
        try:
            value, _, _ = _element(text, brace.start())
        except _UNREADABLE:
            continue
        if is_record(value):
            return brace.start(), True
    return at, False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a key that stands in it twice: nobody can say which one is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} stands twice in one object")
    return value


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches the empty string too
    return match.end()


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


# The value that begins at a place of a text, and where it ends. Raises ValueError or RecursionError.
_decode = json.JSONDecoder(object_pairs_hook=_once).raw_decode

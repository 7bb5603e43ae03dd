"""Records of a JSON file, one by one: an array of objects, or one object per line."""

import json
import re
from collections.abc import Iterator
from typing import Any

from kvarena.harness.trace.bad_records import BadRecords

_OPENING = re.compile(r"\s*\[\s*")
_SEPARATOR = re.compile(r"\s*([,\]]?)\s*")


def json_records(text: str, bad: BadRecords) -> Iterator[tuple[int, Any]]:
    """(record number from 1, value) of every record that can be read; the others go to `bad`."""
    opening = _OPENING.match(text)
    return _array(text, opening.end(), bad) if opening else _lines(text, bad)


def _lines(text: str, bad: BadRecords) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(filter(str.strip, text.split("\n")), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            bad.add(number, f"not JSON: {error}")
        else:
            yield number, value


def _array(text: str, at: int, bad: BadRecords) -> Iterator[tuple[int, Any]]:
    """Elements of an array, the first at `at`. Past one that cannot be read nothing can: what precedes is kept."""
    decode = json.JSONDecoder().raw_decode
    number, mark = 0, "" if text.startswith("]", at) else ","
    while mark == ",":
        number += 1
        try:
            value, at = decode(text, at)
        except ValueError as error:
            bad.add(number, f"broken or truncated JSON, nothing from here on can be read: {error}")
            return
        yield number, value
        separator = _SEPARATOR.match(text, at)
        assert separator is not None  # the pattern matches the empty string too
        mark, at = separator[1], separator.end()
    if number and (mark != "]" or at != len(text)):
        bad.add(number + 1, f"broken or truncated JSON after record {number}: the array does not end there")

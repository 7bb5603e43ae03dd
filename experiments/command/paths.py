"""Paths among the overrides, in quotes: Hydra's grammar then reads them as they stand.

Outside quotes it has no letter beyond ASCII, no bracket and no quote, and a comma separates the values of a sweep. What
Hydra reads, and names no file as it stands, is left to it: `null`, a text in quotes, `choice(a,b)`, `${oc.env:HOME}/a`.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvarena.errors import UserError

_KEYS = ("trace.path", "trace.prefix_path", "trace.tokenizer", "trace.data_files", "model.checkpoint")
_MAPPING = "params.paths"  # name -> path
_ENTRY = re.compile(r"(\s*\w+\s*:\s*)(.*?)(\s*)(?=,\s*\w+\s*:|$)", re.DOTALL)
_PIECE = re.compile(r"('(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")(?=,|$)|[^,]+", re.DOTALL)


def quoted(arguments: Sequence[str], *, sweeping: bool = False) -> list[str]:
    """The arguments, each path in quotes that Hydra would misread; sweeping: a comma parts the values of a key.

    Raises UserError for what a configuration cannot say: a file's name that holds `${`, an argument that is no UTF-8.
    """
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python stands in for such bytes
            raise UserError(f"{argument!a}: is not UTF-8, and results are written in UTF-8; give it another name")
    return [_quoted_one(argument, sweeping) for argument in arguments]


def _quoted_one(argument: str, sweeping: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.strip().lstrip("+")
    if equals and name == _MAPPING and value.startswith("{") and value.endswith("}"):
        entries = [f"{head}{_as_read(argument, path)}" for head, path, _ in _ENTRY.findall(value[1:-1])]
        return f"{key}={{{','.join(entries)}}}" if entries else argument
    if not equals or not (name in _KEYS or name.startswith(f"{_MAPPING}.")):
        return argument
    return f"{key}={_swept(argument, value) if sweeping else _as_read(argument, value)}"


def _as_read(argument: str, path: str) -> str:
    """A path as Hydra takes it."""
    exists = _exists(path)
    if exists and "${" in path:
        raise UserError(
            f"{argument}: ${{ begins a reference to another key; give the file a name, or a link, without it"
        )
    return in_quotes(path) if exists or not _is_read(path) else path


def _swept(argument: str, value: str) -> str:
    """The paths of a sweep. One that exists may have commas in its name; the longest that does is taken."""
    pieces = [value] if _exists(value) else [piece.group() for piece in _PIECE.finditer(value)]
    paths = list(_joined(pieces))
    if len(paths) == len(pieces) and _is_read(value) and not any(map(_exists, paths)):
        return value  # also choice(a,b) and the like
    for path in paths:
        if "," in path and path[0] not in "'\"":
            print(f"{argument}: {path} exists, and is taken for one path", file=sys.stderr)
    return ",".join(_as_read(argument, path) for path in paths)


def _joined(pieces: Sequence[str]) -> Iterator[str]:
    """Pieces between commas, put together again where that names a file."""
    start = 0
    while start < len(pieces):
        ends = range(len(pieces), start + 1, -1)
        end = next((end for end in ends if _exists(",".join(pieces[start:end]))), start + 1)
        yield ",".join(pieces[start:end])
        start = end


def in_quotes(text: str) -> str:
    """A text that Hydra reads as it stands."""
    return QuotedString(text, Quote.double).with_quotes()


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, no home, a null byte
        return False


def _is_read(value: str) -> bool:
    try:
        OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return False
    return True


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra reads them. Raises UserError for what is none."""
    parser = OverridesParser.create()
    return [_parsed_one(parser, each) for each in overrides]


def _parsed_one(parser: OverridesParser, override: str) -> Override:
    try:
        read = parser.parse_override(override)
        if "${" in override and not read.is_sweep_override():
            OmegaConf.create([read.value()])
        return read
    except (HydraException, OmegaConfBaseException) as error:
        key, equals, value = override.partition("=")
        advice = ""
        if equals and value[:1] not in tuple("[{"):
            advice = f". A text is read as it stands in quotes: {shlex.quote(f'{key}={in_quotes(value)}')}"
        elif equals:
            advice = ". Write what is a text in quotes, and all of it once more in the shell's"
        raise UserError(f"{override}: cannot be read: {str(error).splitlines()[0]}{advice}") from error

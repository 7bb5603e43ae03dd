"""Sizes in bytes as people write them: `2MB`, `64 KB`, 65536. Units are binary, as in both papers."""

import re

from kvarena.errors import UserError

KB = 1 << 10
MB = 1 << 20
GB = 1 << 30

_UNITS = {"": 1, "B": 1, "KB": KB, "KIB": KB, "MB": MB, "MIB": MB, "GB": GB, "GIB": GB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Bytes of a size: an integer, or text such as `2MB`. Raises UserError, with `what` the setting is called."""
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise UserError(f"{what}={size}: a size cannot be negative")
        return size
    match = _SIZE.fullmatch(str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise UserError(f"{what}={size!r}: not a size; write bytes, or a number with KB, MB or GB, such as 64KB or 2MB")
    parsed = float(match[1]) * _UNITS[match[2].upper()]
    if parsed != int(parsed):
        raise UserError(f"{what}={size!r}: not a whole number of bytes")
    return int(parsed)


def format_bytes(num_bytes: int) -> str:
    """The size as people write it; exact where it is a whole number of a unit (`64KB`), else rounded (`1.25 GB`)."""
    for unit, scale in (("GB", GB), ("MB", MB), ("KB", KB)):
        if num_bytes >= scale:
            return f"{num_bytes // scale}{unit}" if num_bytes % scale == 0 else f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"


def round_up(num_bytes: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-num_bytes // multiple) * multiple

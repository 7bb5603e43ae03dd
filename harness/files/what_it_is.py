"""What a file is that holds no text, by its first bytes: a download that went wrong, or data that something packed."""

from codecs import BOM_UTF8
from pathlib import Path

from kvarena.errors import UserError

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"

_UNPACK = "unpack it first"
_CONVERT = "a trace is CSV, JSON, JSON lines or parquet"
_KINDS = (
    (b"version https://git-lfs", "is a pointer of git-lfs, not the data: `git lfs pull` gets it"),
    (b"<", "is a page (HTML or XML), not data: what answered the download was a login or an error, perhaps"),
    (b"PK\x03\x04", f"is a zip archive (or a spreadsheet): {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is packed with zstd: {_UNPACK}"),
    (b"\xfd7zXZ\0", f"is packed with xz: {_UNPACK}"),
    (b"BZh", f"is packed with bzip2: {_UNPACK}"),
    (b"7z\xbc\xaf", f"is a 7z archive: {_UNPACK}"),
    (b"\x04\x22\x4d\x18", f"is packed with lz4: {_UNPACK}"),
    (GZIP, f"is gzip inside gzip: {_UNPACK}"),
    (PARQUET, f"is parquet inside gzip: {_UNPACK}"),
    (b"PARE", f"is encrypted parquet: {_CONVERT}"),
    (b"ARROW1", f"is an Arrow file: {_CONVERT}"),
    (b"\x93NUMPY", f"is an array of numpy: {_CONVERT}"),
    (b"\x89HDF", f"is an HDF5 file: {_CONVERT}"),
    (b"SQLite format 3", f"is a database of SQLite: {_CONVERT}"),
    (b"%PDF", f"is a PDF: {_CONVERT}"),
    (b"\x80\x04", f"is a pickle of Python: {_CONVERT}"),
    (b"\x80\x05", f"is a pickle of Python: {_CONVERT}"),
    (b"\0\0\0\0", "begins with NUL bytes: a copy or a download that never finished, perhaps"),
)
_TAR = b"ustar"  # at byte 257


def refuse(beginning: bytes, path: Path) -> None:
    """Raises UserError for the beginning of a file that is known to hold no text."""
    for magic, what in _KINDS:
        if beginning.removeprefix(BOM_UTF8).lstrip().startswith(magic):
            raise UserError(f"{path}: {what}")
    if beginning[257:].startswith(_TAR):
        raise UserError(f"{path}: is a tar archive: {_UNPACK}")

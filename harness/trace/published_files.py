"""Which files are the papers' own data: by content, as results/published/trace_files.csv lists it, never by name.

A paper's filter belongs to its data. Of anybody else's, it would leave out requests that nobody asked to lose.
"""

import csv
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

from kvarena.harness.config import load, names
from kvarena.harness.files.content import hashes
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.trace.config import TraceConfig

TRACE_FILES = PUBLISHED / "trace_files.csv"
FITS_CONTEXT = "fits_context"


def is_published(config: TraceConfig, known: Mapping[str, str] | None = None) -> bool:
    """Whether lengths are those of conf/trace/<config.name>.yaml: its embedded table, or a file listed for that name.

    Given lengths, other tables, other files and data sets of the hub are not. `known`: hashes by path, of files that
    may be gone since.
    """
    if config.path is not None:
        digest = (known or hashes([config.path])).get(config.path)
        return (digest, config.name) in _listed()
    return config.table is not None and config.table == _table(config.name)


@cache  # asked for every row of a summary
def _table(name: str) -> str | None:
    """The embedded table of conf/trace/<name>.yaml; None where there is no such file, or it has none."""
    return load("trace", name).get("table") if name in names("trace") else None


def filter_of(config: TraceConfig, max_tokens: int | None) -> str:
    """Name of the recipe that is applied: what the user asks for, else the paper's on its own data, else fits_context.

    max_tokens: what the context holds; where it is None, nothing has to fit.
    """
    if config.filter is not None:
        return config.filter
    if is_published(config):
        return config.paper_filter
    return "none" if max_tokens is None else FITS_CONTEXT


def _listed() -> set[tuple[str | None, str]]:
    """(hash, trace) of every file that is listed."""
    return _read(TRACE_FILES, TRACE_FILES.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read(path: Path, changed_ns: int) -> set[tuple[str | None, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["sha256"], row["trace"]) for row in csv.DictReader(file)}

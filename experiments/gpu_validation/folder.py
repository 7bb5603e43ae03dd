"""The files of `--out DIR`, few and flat, complete after every case:

validation.jsonl   a line for each case, as they come (record.py)
matrix.md          the same as a table
environment.json   machine, versions, commit
log.txt            what the children printed
kept.tar.xz        the experiments' runs, as results/ wants them
"""

import io
import json
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any

from kvarena.experiments.gpu_validation import matrix, record
from kvarena.experiments.gpu_validation.record import Origin, Record

LARGE_BYTES = 1 << 20  # a table of single steps beyond this is not kept
_SHOWN = ("torch", "triton", "vllm", "flashinfer-python", "flash-attn", "cuda-bindings")


class Folder:
    """One folder of results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records_file = path / "validation.jsonl"
        self.log = path / "log.txt"

    def add(self, made: Record) -> None:
        """Write down what a case came to."""
        record.append(self.records_file, made)

    def records(self) -> list[Record]:
        """All records so far."""
        return record.read(self.records_file)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What the first step found; nothing where it has not ended."""
        file = self.path / "environment.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    def write_environment(self, found: dict[str, Any]) -> None:
        """Keep what the first step found."""
        (self.path / "environment.json").write_text(json.dumps(found, indent=2, default=str) + "\n")

    def origin(self) -> Origin:
        """Where records of this folder come from."""
        found = self.environment
        versions = found.get("libraries", {})
        libraries = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
        commit = str(found.get("git", {}).get("commit") or "")[:12]
        dirty = found.get("git", {}).get("dirty")
        return Origin(found.get("device", "unknown"), libraries, commit + "+" * bool(dirty))

    def rewrite(self, scratch: Path) -> None:
        """Bring the table and the archive up to date."""
        (self.path / "matrix.md").write_text(matrix.written(self.records()))
        runs = scratch / "runs"
        if runs.is_dir():
            _pack(runs, self.path / "kept.tar.xz")

    def unpack(self, scratch: Path) -> None:
        """Take up the runs of an earlier session over the same folder."""
        archive = self.path / "kept.tar.xz"
        if archive.is_file():
            with tarfile.open(archive) as tar:
                tar.extractall(scratch / "runs", filter="data")


def _pack(runs: Path, archive: Path) -> None:
    """`<experiment>/<file>` of every finished run, the last one of each name; whole, or not replaced."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for file in sorted(runs.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(runs).parts)
            if file.is_file() and not hidden and file.stat().st_size <= LARGE_BYTES:
                tar.add(file, file.relative_to(runs).as_posix())
    partial = archive.with_name(f".{archive.name}")
    partial.write_bytes(buffer.getvalue())
    partial.replace(archive)

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
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from kvarena.experiments.gpu_validation import matrix, record
from kvarena.experiments.gpu_validation.record import Origin, Record, Values
from kvarena.harness.record.writing import explained, write_whole

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
        with self._explained():
            record.append(self.records_file, made)

    def opened_log(self, heading: str) -> BinaryIO:
        """The log, open behind a heading for what comes next."""
        with self._explained():
            with self.log.open("ab") as log:
                log.write(f"\n==== {heading}\n".encode())
            return self.log.open("ab")

    def records(self) -> list[Record]:
        """All records so far."""
        return record.read(self.records_file)

    @cached_property
    def environment(self) -> Values:
        """What the first step found; nothing where it has not ended."""
        file = self.path / "environment.json"
        found: Values = json.loads(file.read_text()) if file.is_file() else {}
        return found

    def write_environment(self, found: Values) -> None:
        """Keep what the first step found."""
        with self._explained():
            write_whole(self.path / "environment.json", json.dumps(found, indent=2, default=str) + "\n")

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
        runs = scratch / "runs"
        with self._explained():
            write_whole(self.path / "matrix.md", matrix.written(self.records()))
            if runs.is_dir():
                write_whole(self.path / "kept.tar.xz", _packed(runs))

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.path, "What is recorded stays: once there is room, the same command goes on from there.")

    def unpack(self, scratch: Path) -> None:
        """Take up the runs of an earlier session over the same folder."""
        archive = self.path / "kept.tar.xz"
        if archive.is_file():
            with tarfile.open(archive) as tar:
                tar.extractall(scratch / "runs", filter="data")


def _packed(runs: Path) -> bytes:
    """An archive with `<experiment>/<file>` of every finished run, the last one of each name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for file in sorted(runs.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(runs).parts)
            if file.is_file() and not hidden and file.stat().st_size <= LARGE_BYTES:
                tar.add(file, file.relative_to(runs).as_posix())
    return buffer.getvalue()

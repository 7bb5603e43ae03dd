"""The files of `--out DIR`, few and flat, complete after every case:

validation.jsonl   a line for each case, as they come (record.py)
matrix.md          the same as a table
environment.json   machine, versions, commit
log.txt            what the children printed
kept.tar.xz        the experiments' runs, as results/ wants them; unfinished/ holds the cells of one that was killed

Together they stay below a limit: what a borrowed machine sends back is limited.
"""

import io
import json
import shutil
import tarfile
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation import matrix, record
from kvarena.experiments.gpu_validation.record import Origin, Record, Values
from kvarena.harness.record.writing import explained, write_whole

LIMIT_BYTES = 16 << 20  # of all files, unless told otherwise
LOG_BYTES = 1 << 20  # of the log's end that is kept
LEFT_OUT = "left-out.txt"  # in the archive: names of files that were too large
_ARCHIVE = "kept.tar.xz"
_SHOWN = ("torch", "triton", "vllm", "flashinfer-python", "flash-attn", "cuda-bindings")


class Folder:
    """One folder of results."""

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self._limit_bytes = path, limit_bytes
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
        """Bring the table and the archive up to date, and cut the log's beginning off where it grew long."""
        runs = scratch / "runs"
        with self._explained():
            write_whole(self.path / "matrix.md", matrix.written(self.records()))
            if self.log.is_file() and self.log.stat().st_size > LOG_BYTES:
                write_whole(self.log, self.log.read_bytes()[-LOG_BYTES:])
            others = sum(file.stat().st_size for file in self.path.iterdir() if file.name != _ARCHIVE)
            if runs.is_dir():
                write_whole(self.path / _ARCHIVE, _packed(runs, self._limit_bytes - others))

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.path, "What is recorded stays: once there is room, the same command goes on from there.")

    def take_over(self, earlier: Path) -> None:
        """Go on from another session's folder: its records, its log and its runs. Raises UserError where it has none.

        A folder that has records of its own keeps them.
        """
        if not (earlier / self.records_file.name).is_file():
            raise UserError(f"--resume {earlier}: holds no {self.records_file.name}, so it is no session's folder")
        if not self.records_file.is_file():
            with self._explained():
                for file in earlier.iterdir():
                    shutil.copyfile(file, self.path / file.name)

    def unpack(self, scratch: Path) -> None:
        """Take up the runs of an earlier session over the same folder."""
        archive = self.path / _ARCHIVE
        if archive.is_file():
            with tarfile.open(archive) as tar:
                tar.extractall(scratch / "runs", filter="data")


def _packed(runs: Path, limit_bytes: int) -> bytes:
    """An archive of the runs; where it gets too large the largest files are left out, and named in it."""
    files = sorted((file for file in runs.rglob("*") if _is_kept(file, runs)), key=lambda file: file.stat().st_size)
    left_out: list[str] = []
    while True:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:  # the GPU waits meanwhile
            for file in sorted(files):
                tar.add(file, file.relative_to(runs).as_posix())
            if left_out:
                names = "\n".join(left_out).encode()
                member = tarfile.TarInfo(LEFT_OUT)
                member.size = len(names)
                tar.addfile(member, io.BytesIO(names))
        if buffer.tell() <= limit_bytes or not files:
            return buffer.getvalue()
        left_out.append(files.pop().relative_to(runs).as_posix())


def _is_kept(file: Path, runs: Path) -> bool:
    """A file of a finished run, or of a finished cell of one that was killed; none that was being written."""
    hidden = [part for part in file.relative_to(runs).parts if part.startswith(".") and part != ".unfinished"]
    return file.is_file() and not hidden

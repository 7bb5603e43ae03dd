"""One side of a comparison: a child process that times benchmarks on one tree's package, and waits in between."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvarena.errors import UserError
from kvarena.harness.paths import ROOT

_WORKER = Path(__file__).with_name("worker.py")
_PATIENCE_S = 120.0  # for one answer: the first call of a kernel compiles it


class WorkerDied(Exception):
    """The child process ended, or no longer answers."""


class Side:
    """`tree` is a checkout; the benchmarks are always this tree's file `suite`, only the package differs."""

    def __init__(self, tree: Path, suite: str, environment: Mapping[str, str] | None = None) -> None:
        """Raises UserError for a tree that is no checkout."""
        if not (tree / ".import").is_dir():
            raise UserError(f"{tree} has no folder .import: it is no checkout that the gate could run")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), suite],
            env={**os.environ, **(environment or {}), "PYTHONPATH": str(tree / ".import"), "PYTHONSAFEPATH": "1"},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            hello = self._receive()
        except WorkerDied as error:
            self.close()
            raise UserError(f"the benchmarks do not start on {tree}: {error}") from error
        self.benchmarks: list[str] = hello["benchmarks"]
        self.own: list[str] = hello["own"]  # of the tree's own suite, for what has vanished since

    def ask(self, benchmark: str) -> None:
        """Start one sample."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has died; `answer` says of what
            self._process.stdin.write(f"{benchmark}\n")
            self._process.stdin.flush()

    def answer(self) -> float | str:
        """Seconds of the sample asked for, or what went wrong. Raises WorkerDied."""
        reply = self._receive()
        return float(reply["seconds"]) if "seconds" in reply else str(reply["error"])

    def sample(self, benchmark: str) -> float | str:
        """Take one sample."""
        self.ask(benchmark)
        return self.answer()

    def _receive(self) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        ready, _, _ = select.select([pipe], [], [], _PATIENCE_S)
        line = pipe.readline() if ready else ""
        if not line:
            self._process.kill()
            raise WorkerDied(f"no answer within {_PATIENCE_S:.0f} s" if not ready else self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"it left with status {status}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the child process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # it died with a line unread
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


HEAD = ROOT  # the tree that the gate itself is part of

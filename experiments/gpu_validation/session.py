"""One session: steps in order, each in a child process, until the budget is used up.

The parent never touches the GPU. It watches the records grow: a case that takes too long is killed with its
process, and what was left of the step goes on in another one. Every case ends up with a record.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from kvarena.experiments.gpu_validation.child import START_ANOTHER
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.plan import STEPS
from kvarena.experiments.gpu_validation.record import Record, Result, now
from kvarena.experiments.gpu_validation.step import Step
from kvarena.harness.paths import ROOT

REHEARSAL_PATIENCE = 6  # the limits are those of a machine with a GPU; a small or busy one takes longer
LEAST_S = 5.0  # with less than this left, nothing is started
_POLL_S = 0.05
_FAULTS = (signal.SIGSEGV, signal.SIGBUS)

Command = Callable[[Step, str, Folder, Path, Sequence[str]], list[str]]


def child_command(step: Step, device: str, folder: Folder, scratch: Path, cases: Sequence[str]) -> list[str]:
    """How a step's process is started."""
    module = "kvarena.experiments.gpu_validation.child"
    return [sys.executable, "-m", module, step.name, device, str(folder.path), str(scratch), *cases]


class Session:
    """Runs steps and keeps the folder up to date."""

    def __init__(
        self, folder: Folder, device: str, scratch: Path, budget_s: float, command: Command = child_command
    ) -> None:
        self._folder, self._device, self._scratch, self._command = folder, device, scratch, command
        self._start = time.monotonic()
        self._end = self._start + budget_s
        self._patience = 1 if device == "cuda" else REHEARSAL_PATIENCE

    def run(self, steps: Sequence[Step] = STEPS) -> list[Record]:
        """Run what has not passed yet in this folder, of this code on this machine. Returns this session's records."""
        before = self._folder.records()
        for step in steps:
            passed = set() if step is STEPS[0] else self._passed(before)
            pending = [case for case in self._cases(step) if (step.name, case) not in passed]
            if pending:
                self._run_step(step, pending)
                self._folder.rewrite(self._scratch)
        return self._folder.records()[len(before) :]

    def _passed(self, before: Sequence[Record]) -> set[tuple[str, str]]:
        origin = Folder(self._folder.path).origin()
        return {record.key for record in before if record.result is Result.PASSED and record.origin == origin}

    def _cases(self, step: Step) -> list[str]:
        try:
            return step.cases(self._device)
        except ModuleNotFoundError as error:
            self._note(step, "all", Result.NOT_RUN, f"needs {error.name}, not installed")
            return []

    def _run_step(self, step: Step, cases: list[str]) -> None:
        deadline = min(time.monotonic() + self._patience * step.limit_s, self._end)
        while cases:
            if (reason := self._refusal(step)) or deadline - time.monotonic() < LEAST_S:
                used_up = f"the {'session' if deadline == self._end else 'step'}'s time was used up"
                for case in cases:
                    self._note(step, case, Result.NOT_RUN, reason or used_up)
                return
            cases = self._run_child(step, cases, deadline)

    def _refusal(self, step: Step) -> str:
        """Why nothing but the first step can run: there is no GPU."""
        if self._device == "cpu" or step is STEPS[0]:
            return ""
        environment = Folder(self._folder.path).environment
        return "no CUDA device" if environment.get("cuda") is False else ""  # a step that ended early says nothing

    def _run_child(self, step: Step, cases: list[str], deadline: float) -> list[str]:
        """Run one process; returns the cases that are left."""
        known = len(self._folder.records())
        with self._folder.opened_log(f"{step.name}: {', '.join(cases)}") as log:
            started = log.tell()
            process = subprocess.Popen(
                self._command(step, self._device, self._folder, self._scratch, cases),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
            reason, last = self._watch(process, step, known, deadline)
        for record in self._folder.records()[known:]:
            self._show(record)
        left = cases[len(self._folder.records()) - known :]
        if not left or process.returncode == START_ANOTHER:
            return left
        result, why = _death(process.returncode, reason, _last_line(self._folder.log, started))
        self._note(step, left[0], result, why, time.monotonic() - last)
        return left[1:]

    def _watch(self, process: subprocess.Popen[bytes], step: Step, known: int, deadline: float) -> tuple[str, float]:
        """Wait for the end, or bring it about. Returns why it was brought about, and when the last case began."""
        last, done = time.monotonic(), known
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                if (count := len(self._folder.records())) > done:
                    last, done = time.monotonic(), count
                time_s = time.monotonic()
                if time_s > deadline:
                    return "the step's or the session's time was used up", last
                if time_s - last > (limit_s := self._patience * step.case_limit_s):
                    return f"took longer than {limit_s:g} s", last
            return "", last
        finally:
            _kill(process)

    def _note(self, step: Step, case: str, result: Result, reason: str, seconds: float = 0.0) -> None:
        origin = Folder(self._folder.path).origin()
        record = Record(step.name, case, result, reason, seconds=round(seconds, 2), at=now(), origin=origin)
        self._folder.add(record)
        self._show(record)

    def _show(self, record: Record) -> None:
        numbers = "; ".join(f"{name} = {value}" for name, value in list(record.values.items())[:4])
        shown = f"{record.result}{f': {record.reason}' if record.reason else ''}{f' ({numbers})' if numbers else ''}"
        elapsed = time.monotonic() - self._start
        print(f"{elapsed:4.0f} s  {record.step}: {record.case}: {shown}"[:200], file=sys.stderr, flush=True)


def _environment() -> dict[str, str]:
    """Our package is found, and the checkout's root is not on the path (run.sh says why); nothing is compiled for
    minutes in the middle of a session."""
    paths = [str(ROOT / ".import"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        "FLASHINFER_DISABLE_JIT": "1",
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process, and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _death(status: int, killed_because: str, last_line: str) -> tuple[Result, str]:
    """How the case ended that a process died in."""
    if killed_because:
        return Result.TIMED_OUT, killed_because
    if status < 0:
        name = signal.Signals(-status).name
        return (Result.FAULTED if -status in _FAULTS else Result.FAILED), f"the process died of {name}"
    return Result.FAILED, f"the process ended with {status}: {last_line}"


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"

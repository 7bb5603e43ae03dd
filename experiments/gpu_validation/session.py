"""One session: rows of a plan in order, each in a forked process, until the budget is used up.

The parent has imported everything, and never touches the GPU: a child is there at once, with a context of its own. The
parent watches the records grow: a case that takes too long is killed with its process, and what was left of the row
goes on in another one. Every case ends up with a record.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

from kvarena.experiments.gpu_validation import child
from kvarena.experiments.gpu_validation.code import code_of
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.plan import Planned, Row
from kvarena.experiments.gpu_validation.record import Record, Result, now
from kvarena.experiments.gpu_validation.step import STEPS, Context, Step

REHEARSAL_PATIENCE = 6  # the limits are those of a machine with a GPU; a small or busy one takes longer
LEAST_S = 5.0  # with less than this left, nothing is started
_POLL_S = 0.05
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)
_FAULTS = (signal.SIGSEGV, signal.SIGBUS)


def preload(planned: Sequence[Planned]) -> None:
    """Import what the cases will use, once for all their processes. What cannot be imported is their finding."""
    for row, cases in planned:
        for name in (row.step.module, *(name for case in cases for name in row.step.uses(case))):
            if name.startswith("kvarena."):
                with suppress(Exception):  # a library that does not fit another one raises what it likes
                    import_module(name)


def compile_once() -> None:
    """Compile what the driver maps with, before any process needs it; without a numba that works it does without."""
    with suppress(ImportError, RuntimeError):
        from kvarena.allocators.vmm.cuda_loop import cuda_loop

        cuda_loop()


class Session:
    """Runs rows and keeps the folder up to date."""

    def __init__(self, folder: Folder, device: str, scratch: Path, budget_s: float) -> None:
        self._folder, self._device, self._scratch = folder, device, scratch
        self._start = time.monotonic()
        self._end = self._start + budget_s
        self._patience = 1 if device == "cuda" else REHEARSAL_PATIENCE

    def run(self, planned: Sequence[Planned]) -> list[Record]:
        """Run what has not passed yet in this folder, of this code on this machine. Returns this session's records.

        What has passed under other code waits until all else has run.
        """
        before = self._folder.records()
        first = [each for each in planned if each[0].step is STEPS[0]]
        for row, cases in first:
            self._run_row(row, cases)
        rest = [each for each in planned if each[0].step is not STEPS[0]]
        for stale in (False, True):
            for row, cases in rest:
                if due := [case for case in cases if self._is_due(before, row.step, case, stale)]:
                    self._run_row(row, due)
        return self._folder.records()[len(before) :]

    def _is_due(self, before: Sequence[Record], step: Step, case: str, stale: bool) -> bool:
        """Whether a case has never passed on this machine; or (`stale`) has, but under other code."""
        codes = {
            record.code
            for record in before
            if record.key == (step.name, case) and record.result is Result.PASSED and self._is_here(record)
        }
        return bool(codes) and code_of(step, case) not in codes if stale else not codes

    def _is_here(self, record: Record) -> bool:
        """Whether a record is of this machine and these libraries, whatever the commit."""
        return (record.origin.device, record.origin.libraries) == self._here

    @cached_property
    def _here(self) -> tuple[str, str]:
        origin = Folder(self._folder.path).origin()
        return origin.device, origin.libraries

    def _run_row(self, row: Row, cases: list[str]) -> None:
        for case in cases:
            code_of(row.step, case)  # read and parsed once, for all processes
        deadline = min(time.monotonic() + self._patience * row.limit_s, self._end)
        while cases:
            if (reason := self._refusal(row)) or deadline - time.monotonic() < LEAST_S:
                used_up = f"the {'session' if deadline == self._end else 'step'}'s time was used up"
                for case in cases:
                    self._note(row.step, case, Result.NOT_RUN, reason or used_up)
                break
            cases = self._run_child(row, cases, deadline)
        self._folder.rewrite(self._scratch)

    def _refusal(self, row: Row) -> str:
        """Why nothing but the first step can run: there is no GPU."""
        if self._device == "cpu" or row.step is STEPS[0]:
            return ""
        environment = Folder(self._folder.path).environment
        return "no CUDA device" if environment.get("cuda") is False else ""  # a step that ended early says nothing

    def _run_child(self, row: Row, cases: list[str], deadline: float) -> list[str]:
        """Run one process; returns the cases that are left."""
        known, step = len(self._folder.records()), row.step
        with self._folder.opened_log(f"{step.name}: {', '.join(cases)}") as log:
            started = log.tell()
            process = _forked(step, cases, Context(self._device, self._folder.path, self._scratch), log)
            status, reason, last = self._watch(process, row, known, deadline)
        for record in self._folder.records()[known:]:
            self._show(record)
        left = cases[len(self._folder.records()) - known :]
        if not left or status == child.START_ANOTHER:
            return left
        result, why = _death(status, reason, _last_line(self._folder.log, started))
        self._note(step, left[0], result, why, time.monotonic() - last)
        return left[1:]

    def _watch(self, process: int, row: Row, known: int, deadline: float) -> tuple[int, str, float]:
        """Wait for the end, or bring it about. Returns the exit status (minus a signal's number), why it was brought
        about, and when the last case began.
        """
        last, done, limit_s = time.monotonic(), known, self._patience * row.case_limit_s
        try:
            while True:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status), "", last
                time.sleep(_POLL_S)
                if (count := len(self._folder.records())) > done:
                    last, done = time.monotonic(), count
                time_s = time.monotonic()
                late = "the step's or the session's time was used up" if time_s > deadline else ""
                if late or time_s - last > limit_s:
                    return _killed(process), late or f"took longer than {limit_s:g} s", last
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # whatever it has started

    def _note(self, step: Step, case: str, result: Result, reason: str, seconds: float = 0.0) -> None:
        origin, code = Folder(self._folder.path).origin(), code_of(step, case)
        record = Record(step.name, case, result, reason, seconds=round(seconds, 2), at=now(), origin=origin, code=code)
        self._folder.add(record)
        self._show(record)

    def _show(self, record: Record) -> None:
        numbers = "; ".join(f"{name} = {value}" for name, value in list(record.values.items())[:4])
        shown = f"{record.result}{f': {record.reason}' if record.reason else ''}{f' ({numbers})' if numbers else ''}"
        elapsed = time.monotonic() - self._start
        print(f"{elapsed:4.0f} s  {record.step}: {record.case}: {shown}"[:200], file=sys.stderr, flush=True)


def _forked(step: Step, cases: Sequence[str], context: Context, log: BinaryIO) -> int:
    """Start a process that runs the cases; it leads a group of its own, and what it says goes to the log."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: a library's pool that sleeps holds no lock
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setpgid(0, 0)  # in the session of whoever started us: what ends that one ends this
        _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # else it would hold the GPU's memory after us
        os.environ["FLASHINFER_DISABLE_JIT"] = "1"  # it would compile for minutes
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        status = child.main(step, cases, context)
    except SystemExit as left:
        print(left)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # tensors over addresses must not be taken down in an order of the interpreter's choice


def _killed(process: int) -> int:
    """End the process, and whatever it started; minus the number of the signal."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.kill(process, signal.SIGKILL)  # it may not lead its group yet
    os.waitpid(process, 0)
    return -signal.SIGKILL


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

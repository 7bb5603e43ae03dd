"""gpu-validation: whatever happens to a child, every case has a record and the rest goes on."""

import errno
import faulthandler
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation import child, command, matrix
from kvarena.experiments.gpu_validation import session as sessions
from kvarena.experiments.gpu_validation.folder import LEFT_OUT, Folder
from kvarena.experiments.gpu_validation.plan import Row
from kvarena.experiments.gpu_validation.record import Origin, Record, Result, append, fault_behind, latest, read
from kvarena.experiments.gpu_validation.session import Session
from kvarena.experiments.gpu_validation.step import STEPS, Context, Step, step_named
from kvarena.experiments.gpu_validation.steps import sweep
from kvarena.experiments.pagedattention import attention_kernel
from kvarena.harness.paths import ROOT
from kvarena.kernels.registry import get_kernel


@dataclass(frozen=True)
class FakeStep(Step):
    names: tuple[str, ...] = ()

    @property
    def module(self):
        return "kvarena.experiments.gpu_validation.record"

    def cases(self, device):
        return list(self.names)

    def uses(self, case):
        return ()

    def run(self, case, context):
        match case:
            case "segfault":
                faulthandler.disable()
                os.kill(os.getpid(), signal.SIGSEGV)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                (context.folder / "hanging").write_text(str(os.getpid()))
                time.sleep(600)
            case "exit":
                sys.exit("no such library")
            case "fault":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {}


class FakeRow(Row):
    limit_s, case_limit_s = 60.0, 20.0  # in place of the properties


def fake(*names, limit_s=60.0, case_limit_s=20.0, name="step"):
    row = FakeRow(FakeStep(name, "about", names=names), ("*",), 1.0, "none")
    row.limit_s, row.case_limit_s = limit_s, case_limit_s
    return row, list(names)


class TimeOfHangs:
    """Passes only while a child hangs, however busy the machine is."""

    def __init__(self, folder):
        self._note, self._now = folder / "hanging", 0.0

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        time.sleep(seconds)
        if self._note.exists() and Path("/proc", self._note.read_text() or "0").exists():
            self._now += 1.0


def session(path, budget_s=60.0, cuda=True):
    path.mkdir(exist_ok=True)
    folder = Folder(path)
    folder.write_environment(
        {"device": "a-gpu", "cuda": cuda, "libraries": {"torch": "2"}, "git": {"commit": "c" * 40}}
    )
    return Session(folder, "cuda", path / "scratch", budget_s)


def outcomes(records):
    return [(record.case, record.result) for record in records]


# ---- a session -------------------------------------------------------------------------------------------------


def test_whatever_ends_a_child_the_rest_goes_on(tmp_path):
    names = ("a", "segfault", "b", "fault", "c", "exit", "killed", "d")
    records = session(tmp_path).run([fake(*names)])
    assert outcomes(records) == [
        ("a", "passed"), ("segfault", "faulted"), ("b", "passed"), ("fault", "faulted"), ("c", "passed"),
        ("exit", "failed"), ("killed", "failed"), ("d", "passed"),
    ]  # fmt: skip
    reasons = {record.case: record.reason for record in records}
    assert reasons["segfault"] == "the process died of SIGSEGV"
    assert reasons["exit"] == "the process ended with 1: no such library"
    assert records == read(tmp_path / "validation.jsonl")
    assert records[1].origin == Origin("a-gpu", "torch 2", "c" * 12)


def test_a_child_dies_with_its_session(tmp_path):
    parent = os.fork()
    if not parent:
        session(tmp_path).run([fake("hang")])
        os._exit(0)
    note = tmp_path / "hanging"
    try:
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    state = Path("/proc", note.read_text(), "stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.01)


@pytest.fixture
def time_of_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("kvarena.experiments.gpu_validation.session.time", TimeOfHangs(tmp_path))


@pytest.mark.usefixtures("time_of_hangs")
def test_a_case_that_hangs_is_killed_and_the_rest_goes_on(tmp_path):
    records = session(tmp_path).run([fake("a", "hang", "b", case_limit_s=4.0)])
    assert outcomes(records) == [("a", "passed"), ("hang", "timed out"), ("b", "passed")]
    assert records[1].reason == "took longer than 4 s"
    assert 4 < records[1].seconds < 10


@pytest.mark.usefixtures("time_of_hangs")
@pytest.mark.parametrize("which", ["step", "session"])
def test_time_is_limited(tmp_path, which):
    limits = {"limit_s": 7.0} if which == "step" else {}
    records = session(tmp_path, budget_s=60.0 if which == "step" else 7.0).run([fake("a", "hang", "b", **limits)])
    assert outcomes(records) == [("a", "passed"), ("hang", "timed out"), ("b", "not run")]
    assert records[2].reason == f"the {which}'s time was used up"


def test_what_has_passed_is_not_run_again(tmp_path, monkeypatch):
    session(tmp_path).run([fake("a", "fault")])
    assert outcomes(session(tmp_path).run([fake("a", "fault", "b")])) == [("fault", "faulted"), ("b", "passed")]
    assert outcomes(session(tmp_path).run([fake("b")])) == []
    monkeypatch.setattr(sessions, "code_of", lambda step, case: "other")
    monkeypatch.setattr(child, "code_of", lambda step, case: "other")
    again = session(tmp_path).run([fake("a"), fake("c", name="new")])
    assert outcomes(again) == [("c", "passed"), ("a", "passed")]  # what passed under other code waits for all else


def test_another_machine_or_library_is_another_result(tmp_path):
    session(tmp_path).run([fake("a")])
    other = session(tmp_path)
    Folder(tmp_path).write_environment({"device": "another", "cuda": True})
    assert outcomes(other.run([fake("a")])) == [("a", "passed")]


def test_without_a_gpu_nothing_runs_and_everything_is_recorded(tmp_path):
    records = session(tmp_path, cuda=False).run([fake("a", "b")])
    assert [(record.result, record.reason) for record in records] == [("not run", "no CUDA device")] * 2


# ---- its folder ------------------------------------------------------------------------------------------------


def test_few_flat_files_and_the_runs(tmp_path):
    runs = tmp_path / "scratch" / "runs"
    (runs / "decode").mkdir(parents=True)
    (runs / "decode" / "summary.csv").write_text("kept\n")
    (runs / "decode" / "steps.parquet").write_bytes(random.Random(0).randbytes(1 << 20))
    (runs / ".being-written").write_text("")
    cell = runs / "unfinished" / "decode" / ".unfinished" / "1a2b" / "16384-tokens-16"
    cell.mkdir(parents=True)
    (cell / "steps.parquet").write_text("a cell")
    out = tmp_path / "out"
    out.mkdir()
    folder = Folder(out, limit_bytes=1 << 20)
    folder.write_environment({})
    Session(folder, "cpu", tmp_path / "scratch", 60.0).run([fake("a")])
    files = {"validation.jsonl", "matrix.md", "log.txt", "environment.json", "kept.tar.xz"}
    assert {path.name for path in out.iterdir()} == files
    with tarfile.open(out / "kept.tar.xz") as tar:
        kept = ["decode/summary.csv", cell.relative_to(runs).as_posix() + "/steps.parquet"]
        assert tar.getnames() == [*kept, LEFT_OUT]
        assert tar.extractfile(LEFT_OUT).read() == b"decode/steps.parquet"
    assert sum(file.stat().st_size for file in out.iterdir()) <= 1 << 20
    folder.unpack(tmp_path / "again")
    assert (tmp_path / "again" / "runs" / "decode" / "summary.csv").read_text() == "kept\n"


def test_records_come_back_as_they_were(tmp_path):
    record = Record(
        "kernels", "a | b", Result.FAILED, "off", {"gap": 0.5}, 1.5, "2026-11-22", Origin("gpu", "torch", "c")
    )
    append(tmp_path / "r.jsonl", record)
    assert read(tmp_path / "r.jsonl") == [record]
    assert "| a \\| b | gpu | torch | c | 2026-11-22 | failed: off (gap = 0.5) |" in matrix.written([record])


def test_the_latest_record_counts_unless_it_was_not_run():
    passed, not_run = Record("s", "c", Result.PASSED), Record("s", "c", Result.NOT_RUN)
    failed = Record("s", "c", Result.FAILED)
    assert latest([passed, not_run]) == {("s", "c"): passed}
    assert latest([not_run, passed, failed]) == {("s", "c"): failed}
    assert latest([not_run]) == {("s", "c"): not_run}


# ---- a disk that fills -----------------------------------------------------------------------------------------


@pytest.fixture
def disk_of(monkeypatch):
    """Lets `disk_of(n)` take files of n bytes, whoever writes: what begins below and does not fit is cut there."""

    def limit(num_bytes):
        def write(descriptor, line):
            left = num_bytes - os.fstat(descriptor).st_size
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_all(descriptor, line[:left])

        write_all = os.write
        monkeypatch.setattr("kvarena.experiments.gpu_validation.record.os.write", write)

    return limit


@pytest.mark.parametrize("room", [0, 100])
def test_a_line_that_does_not_fit_is_not_begun(tmp_path, disk_of, room):
    kept = Record("s", "a", Result.PASSED)
    Folder(tmp_path).add(kept)
    disk_of((tmp_path / "validation.jsonl").stat().st_size + room)
    with pytest.raises(UserError, match="no space"):
        Folder(tmp_path).add(Record("s", "b", Result.PASSED, reason="x" * 200))
    assert read(tmp_path / "validation.jsonl") == [kept]


def test_a_full_disk_ends_the_session_with_one_message_and_whole_records(tmp_path, monkeypatch, disk_of, capsys):
    """The child's record of `b` does not fit, nor what the parent would say of that."""
    monkeypatch.setattr(command, "Session", lambda folder, *_: session(folder.path))
    monkeypatch.setattr(command, "_asked", lambda *_: [fake("a", "exit", "b")])
    session(tmp_path / "whole").run([fake("a")])
    disk_of((tmp_path / "whole" / "validation.jsonl").stat().st_size + 50)
    with pytest.raises(SystemExit) as left:
        command.main(["--out", str(tmp_path)])
    assert left.value.code == command.USER_ERROR
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == [
        f"error: cannot write results to {tmp_path}: no space is left there. Nothing half-written is left. What is "
        "recorded stays: once there is room, the same command goes on from there."
    ]
    assert outcomes(read(tmp_path / "validation.jsonl")) == [("a", "passed")]


def test_runs_that_the_folder_does_not_take_are_left_outside(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, folder, device, scratch, budget_s):
            self._runs = scratch / "runs" / "decode"

        def run(self, planned):
            self._runs.mkdir(parents=True)
            (self._runs / "summary.csv").write_text("kept\n")
            raise UserError("no space is left there.")

    monkeypatch.setattr(command, "Session", Full)
    monkeypatch.setattr(command, "preload", lambda planned: None)
    monkeypatch.setattr(command, "compile_once", lambda: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "out")])
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: no space is left there. The experiments' runs so far are in ")
    runs = Path(message.split(" are in ")[1].rstrip("."))
    assert (runs / "decode" / "summary.csv").read_text() == "kept\n"
    assert [path for path in tmp_path.iterdir() if path.name != "out"] == [runs.parent]


@pytest.mark.parametrize("name", ["environment.json", "matrix.md"])
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, monkeypatch, name):
    folder = Folder(tmp_path)
    folder.write_environment({"device": "a-gpu"})
    folder.rewrite(tmp_path / "scratch")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space is left there"):
        folder.write_environment({}) if name == "environment.json" else folder.rewrite(tmp_path / "scratch")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- the page --------------------------------------------------------------------------------------------------


def test_docs_show_every_case_of_every_step_as_kept_records_have_it():
    page = matrix.DOCS.read_text()
    assert matrix.with_tables(page, matrix.tables(matrix.kept_records())) == page


def test_tables_take_kept_records_and_no_rehearsal():
    step = step_named("bandwidth")
    case = step.cases("cuda")[0]
    real = Record(step.name, case, Result.PASSED, values={"GB/s": 4000.0}, at="2026-11-22T10:00", origin=Origin("h200"))
    tables = matrix.of_all_steps([real, replace(real, values={"GB/s": 1.0}, origin=Origin("cpu"))])
    assert f"| {case} | h200 | - | - | 2026-11-22 | passed (GB/s = 4000.0) |" in tables
    assert tables.count("not run") == sum(len(step.cases("cuda")) for step in STEPS) - 1


def test_a_page_without_marks_is_refused():
    with pytest.raises(UserError, match="between which the tables stand"):
        matrix.with_tables("# GPU\n", "")


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out DIR says where"),
        (["--out", "x", "--only", "kernel"], "no such step. There are: environment, "),
        (["--out", __file__], "that is a file"),
        (["--out", f"{__file__}/below"], "the folder cannot be made: Not a directory"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == command.USER_ERROR
    assert message in capsys.readouterr().err


def test_list_names_every_case(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--list"])
    shown = capsys.readouterr().out
    assert left.value.code == command.ALL_PASSED
    assert all(case in shown for step in STEPS for case in step.cases("cuda"))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cases_are_told_apart(device):
    for step in STEPS:
        names = step.cases(device)
        assert names
        assert len(set(names)) == len(names)


def test_a_rehearsal_on_the_cpu(tmp_path):
    """The real cases in a process of their own, with the CPU's kernels and the host's driver."""
    steps = ["addresses", "edge", "decode", "graphs"]
    only = [f"--only={step}" for step in steps]
    command_line = [sys.executable, "-P", "-m", "kvarena", "gpu-validation", "--out", str(tmp_path), "--device=cpu"]
    done = subprocess.run([*command_line, *only], capture_output=True, text=True, check=False)
    assert done.returncode == command.ALL_PASSED, done.stderr + (tmp_path / "log.txt").read_text()
    records = read(tmp_path / "validation.jsonl")
    assert [record.key for record in records if record.result is Result.NOT_RUN] == [("graphs", "kernels alone")]
    assert [record.key for record in records] == [
        (step, case) for step in ["environment", *steps] for case in step_named(step).cases("cpu")
    ]
    assert all(record.origin.device == "cpu" and record.code for record in records)
    with tarfile.open(tmp_path / "kept.tar.xz") as tar:
        kept = {name.partition("/")[0] for name in tar.getnames()}
    assert kept == {"decode_throughput_numba_batch_2", "decode_throughput_numba_batch_2_graphs"}


@pytest.mark.parametrize("error", [UserError("no block tables"), RuntimeError("off by 1"), TypeError("an argument")])
def test_a_kernel_that_refuses_costs_its_own_lines(monkeypatch, error):
    def get(name):
        if name == "numba":
            raise error
        return get_kernel(name)

    monkeypatch.setattr(attention_kernel, "get_kernel", get)
    monkeypatch.setattr(sweep, "SLOW", frozenset())
    values = sweep.run("batch 2, context 256", Context("cpu", Path(), Path()))
    assert values["sdpa rows / read"] > 0
    assert values["numba rows, not measured"] == values["numba blocks shuffled, not measured"] == str(error)


def test_a_fault_in_a_sweep_ends_it(monkeypatch):
    def get(name):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attention_kernel, "get_kernel", get)
    with pytest.raises(RuntimeError, match="illegal"):
        sweep.run("batch 2, context 256", Context("cpu", Path(), Path()))


READER = """
import sys, torch
from pathlib import Path
from kvarena.allocators.vmm.host import HostDriver
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.edge import at_the_edge
batch = at_the_edge(HostDriver(65536), Context("cpu", Path(), Path()), more=int(sys.argv[1]), prefill=False)
length = int(batch.view.lengths[1])
print(float(batch.cache.k[1, :length + int(sys.argv[2])].sum()))
"""


@pytest.mark.parametrize(("more", "past", "faults"), [(0, 1, True), (1, 1, False)])
def test_one_token_past_the_edge_is_a_fault(more, past, faults):
    done = subprocess.run(
        [sys.executable, "-c", READER, str(more), str(past)],
        env={"PYTHONPATH": str(ROOT / ".import"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode == -11) == faults, done.stderr
    assert faults or done.returncode == 0, done.stderr


def closed_after_a_fault():
    try:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    finally:
        raise ValueError("closing: 3 calls failed")


def test_a_fault_is_seen_behind_the_errors_it_causes():
    with pytest.raises(ValueError, match="closing") as raised:
        closed_after_a_fault()
    assert fault_behind(raised.value) == "CUDA error: an illegal memory access was encountered"
    assert fault_behind(ValueError("cuCtxSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS")) != ""
    assert fault_behind(ValueError("cuMemsetD8 failed: CUDA_ERROR_LAUNCH_FAILED")) != ""
    assert fault_behind(RuntimeError("CUDA error: unspecified launch failure")) != ""
    assert fault_behind(ValueError("off by 3")) == ""

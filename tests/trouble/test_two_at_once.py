"""Two commands at once: equal ones take turns, others do not meet."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from kvarena.experiments.command.sweep import Sweep
from kvarena.harness.record import provenance, record
from kvarena.harness.record.record import Frames, Measured, Outcome, Recorder, read_frames, write_summary
from kvarena.harness.record.turn import Turn

TABLE = pd.DataFrame({"a": [1, 2]})
HOLDING = """
import sys
from pathlib import Path
from kvarena.harness.record.turn import Turn
turn = Turn(Path(sys.argv[1]), "here")
print("held", flush=True)
sys.stdin.readline()
turn.end()
"""
RUNNING = """
import sys, time
import pandas as pd
from kvarena.harness.record import provenance
from kvarena.harness.record.record import Measured, Outcome, Recorder
provenance.machine = dict
table = pd.DataFrame({"pid": [1]})

def slowly():
    time.sleep(0.2)
    return {"steps": table}

recorder = Recorder("demo", {"value": 0})
for key in "abc":
    recorder.cell(key, slowly)
print("results:", recorder.finish(Outcome(Measured({"steps": table}), table, "q")), flush=True)
"""
Holder = Callable[[Path], subprocess.Popen[str]]


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", code, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    monkeypatch.setenv("KVARENA_SWEEP", "")  # a sweep sets it: give it back at the end
    monkeypatch.setattr(provenance, "machine", dict)
    return tmp_path / "demo"


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Starts a process that has the turn of a path; a line to it ends that."""
    started: list[subprocess.Popen[str]] = []

    def hold(path: Path) -> subprocess.Popen[str]:
        started.append(child(HOLDING, str(path)))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for each in started:
        each.kill()
        each.communicate()


def recorder(value: int = 0) -> Recorder:
    return Recorder("demo", {"value": value})


def outcome() -> Outcome:
    return Outcome(Measured({"steps": TABLE}), TABLE, "q")


def lock_of(value: int = 0) -> Path:
    one = recorder(value)
    one._turn.end()
    return one._turn._path


def test_two_equal_commands_both_end_and_their_measurements_do_not_overlap(runs: Path) -> None:
    both = [child(RUNNING) for _ in range(2)]
    said = [each.communicate(timeout=60) for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert sorted("waiting for process" in err for _, err in said) == [False, True]
    folders = [Path(out.splitlines()[-1].removeprefix("results: ")) for out, _ in said]
    assert len(set(folders)) == 2
    assert all((folder / "summary.csv").is_file() for folder in folders)
    assert not list((runs / ".unfinished").iterdir())


@pytest.mark.parametrize("end", ["ends", "killed", "interrupted"])
def test_who_waits_goes_on_however_the_first_one_ends(
    end: str, holder: Holder, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = recorder()
    kept.cell("a", lambda: {"steps": TABLE})
    kept._turn.end()
    first = holder(kept._turn._path)

    def finish() -> None:
        if end == "ends":
            assert first.stdin is not None
            print(file=first.stdin, flush=True)
        else:
            first.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)

    timer = threading.Timer(0.2, finish)
    timer.start()
    second = recorder()
    timer.join()
    assert f"waiting for process {first.pid}" in capsys.readouterr().err
    second.cell("a", lambda: pytest.fail("what the first had measured is measured again"))
    second.finish(outcome())


def test_interrupting_who_waits_disturbs_nobody(holder: Holder) -> None:
    first = holder(lock_of())
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        recorder()
    assert first.poll() is None


def test_a_third_does_not_slip_between_the_first_and_the_second(tmp_path: Path, holder: Holder) -> None:
    """The first takes the file away: who waited for it must not hold what nobody else can see."""
    path = tmp_path / "lock"
    first = holder(path)
    assert first.stdin is not None
    threading.Timer(0.2, print, (), {"file": first.stdin, "flush": True}).start()
    second = Turn(path, "here")
    assert path.exists()
    third = child(HOLDING, str(path))
    with pytest.raises(subprocess.TimeoutExpired):
        third.wait(0.5)
    second.end()
    assert third.communicate("\n", timeout=10)[0] == "held\n"


def test_equal_sweeps_take_turns(holder: Holder, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Sweep("memory_waste", ["a=1,2"])
    whole._turn.end()
    first = holder(whole._turn._path)
    threading.Timer(0.2, first.kill).start()
    Sweep("memory_waste", ["a=1,2"])
    assert "waiting for process" in capsys.readouterr().err
    holder(whole._turn._path.with_name("another.lock"))
    Sweep("memory_waste", ["a=2,3"])
    assert "waiting" not in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_equal_runs_still_both_end(
    code: int, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlocked(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", unlocked)
    one, other = recorder(), recorder()
    assert capsys.readouterr().err.count("has no locks") == 2

    def overtaken() -> Frames:
        other.cell("a", lambda: {"steps": TABLE.assign(a=7)})
        return {"steps": TABLE}

    assert one.cell("a", overtaken)["steps"].a.tolist() == [7, 7], "what is there is taken"
    assert one.finish(outcome()) != other.finish(outcome())


def test_runs_that_differ_do_not_wait_and_share_a_folder(
    runs: Path, holder: Holder, capsys: pytest.CaptureFixture[str]
) -> None:
    holder(lock_of(0))
    one, other = recorder(1), recorder(2)
    assert "waiting" not in capsys.readouterr().err
    folders = [each.finish(outcome()) for each in (one, other)]
    assert (runs / "latest").resolve() == folders[1]
    assert all((folder / "summary.csv").is_file() for folder in folders)


def at_once(*works: Callable[[], object]) -> None:
    """Run all in threads of their own; raises what one of them raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            for _ in range(40):
                work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_latest_always_points_at_something(tmp_path: Path) -> None:
    link = tmp_path / "latest"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    record._point(link, "one")
    at_once(
        lambda: record._point(link, "one"),
        lambda: record._point(link, "two"),
        lambda: next(link.parent.glob("latest/")),
    )
    assert link.resolve().name in ("one", "two")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "latest"}


@pytest.mark.parametrize("way", ["no links", "in the way"])
def test_a_link_that_cannot_be_made_costs_no_run(
    way: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if way == "no links":
        monkeypatch.setattr(Path, "symlink_to", refused)
    else:
        (runs / "latest").mkdir(parents=True)
    folder = recorder().finish(outcome())
    assert (folder / "summary.csv").is_file()
    assert "cannot be made to point" in capsys.readouterr().err
    assert {path.name for path in runs.iterdir()} - {"latest"} == {".unfinished", folder.name}


def test_a_folder_is_summarised_by_two_and_read_by_others(runs: Path) -> None:
    folder = recorder().finish(outcome())

    def read() -> None:
        pd.testing.assert_frame_equal(pd.read_csv(folder / "summary.csv"), TABLE)
        read_frames(folder)

    at_once(lambda: write_summary(folder, outcome()), lambda: write_summary(folder, outcome()), read)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_turn_is_given_back_where_its_run_is_forgotten(tmp_path: Path, holder: Holder) -> None:
    """As in a notebook, where a run failed and its process lives on."""
    turn = Turn(tmp_path / "lock", "here")
    waiting = child(HOLDING, str(tmp_path / "lock"))
    with suppress(subprocess.TimeoutExpired):
        waiting.wait(0.3)
    del turn
    assert waiting.communicate("\n", timeout=10)[0] == "held\n"

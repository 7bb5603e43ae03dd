"""Which code ran is known, whatever lies beside it, whoever owns it, and where results go."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarena.errors import UserError
from kvarena.harness.record import code_state
from kvarena.harness.record.record import Recorder, runs_folder

State = Callable[[], dict[str, Any]]


def git(folder: Path, *arguments: str) -> str:
    command = ("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    (root / "allocators").mkdir(parents=True)
    (root / "results" / "published").mkdir(parents=True)
    for name in ("run.sh", "allocators/paged.py", "results/published/trace_files.csv", "results/old.csv"):
        (root / name).write_text(name)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(code_state, "ROOT", root)
    monkeypatch.delenv("KVARENA_COMMIT", raising=False)
    return root


@pytest.fixture
def state() -> State:
    """The state as a new process sees it."""

    def ask() -> dict[str, Any]:
        code_state.git_state.cache_clear()
        return code_state.git_state()

    return ask


@pytest.fixture(autouse=True)
def forgotten(checkout: Path) -> Any:
    yield
    code_state.git_state.cache_clear()


def test_a_clean_checkout_is_its_commit(checkout: Path, state: State) -> None:
    assert state() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False, "diff_sha256": None}


@pytest.mark.parametrize(
    "name",
    ["allocators/paged.py", "allocators/mine.py", "results/published/trace_files.csv", "conf/a b'\"\n\\.yaml",
     "kernels/\udcff\udcfe.py", "allocators/é.py"],
)  # fmt: skip
def test_code_that_is_not_committed_counts_by_its_content(name: str, checkout: Path, state: State) -> None:
    file = checkout / name
    file.parent.mkdir(exist_ok=True)
    seen = set()
    for content in ("one", "two"):
        file.write_text(content)
        assert state()["dirty"]
        seen.add(state()["diff_sha256"])
    assert len(seen) == 2
    os.utime(file, (1, 1))
    assert state()["diff_sha256"] in seen, "a time is no content"


def test_a_file_that_is_gone_or_renamed_or_staged_counts(checkout: Path, state: State) -> None:
    (checkout / "allocators/paged.py").rename(checkout / "allocators/other.py")
    moved = state()
    assert moved["dirty"]
    git(checkout, "add", "-A")
    assert state() == moved


def test_what_no_run_reads_is_not_opened(checkout: Path, state: State) -> None:
    clean = state()
    for name in ("big.bin", "results/old.csv", "results/new.csv", "notes.txt"):
        with (checkout / name).open("w") as file:
            file.truncate(1 << 40)  # takes no disk, and hours to hash
    os.mkfifo(checkout / "pipe")
    assert state() == clean


def test_what_is_no_code_among_the_code_stops_nobody(checkout: Path, state: State) -> None:
    folder = checkout / "allocators"
    with (folder / "paged.py").open("w") as file:  # tracked, and grown beyond all code
        file.truncate(1 << 40)
    with (folder / "dump.bin").open("w") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "around").symlink_to(checkout)
    first = state()
    assert first["dirty"]
    with (folder / "dump.bin").open("w") as file:
        file.truncate(1 << 41)
    assert state()["diff_sha256"] != first["diff_sha256"]


def no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))


def another_owner(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(checkout))


def no_history(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").rename(checkout / "not-git")


def in_a_strangers_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_history(checkout, monkeypatch)
    (checkout.parent / "own.txt").touch()
    git(checkout.parent, "init", "-q")
    git(checkout.parent, "add", "own.txt")
    git(checkout.parent, "commit", "-qm", "theirs")


def before_the_first_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_history(checkout, monkeypatch)
    git(checkout, "init", "-q")


SILENT = (no_git, another_owner, no_history, in_a_strangers_repository, before_the_first_commit)


@pytest.mark.parametrize("why", SILENT, ids=lambda each: each.__name__)
def test_where_git_says_nothing_that_is_said_once_and_all_code_counts(
    why: Callable[..., None],
    checkout: Path,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    why(checkout, monkeypatch)
    before = state()
    assert (before["commit"], before["dirty"]) == (None, None)
    code_state.git_state()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "KVARENA_COMMIT" in said
    monkeypatch.setenv("KVARENA_COMMIT", "0123abcd")
    assert state() == before | {"commit": "0123abcd"}
    assert not capsys.readouterr().err
    (checkout / "allocators/paged.py").write_text("changed")
    assert state()["diff_sha256"] != before["diff_sha256"]


def test_a_hook_of_another_repository_does_not_lend_its_commit(
    checkout: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = state()
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert state() == ours


@pytest.mark.parametrize("named", ["", " ", "~no_such_user_here/runs"])
def test_a_folder_for_results_that_is_none_is_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_RUNS", named)
    with pytest.raises(UserError, match="KVARENA_RUNS"):
        runs_folder()


@pytest.mark.parametrize("named", ["file", "file/below", "/proc/kvarena", "x" * 300])
def test_a_folder_for_results_that_cannot_be_is_told(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path / named))
    with pytest.raises(UserError, match="cannot write results"):
        Recorder("demo", {"value": 0})


def test_a_folder_for_results_may_be_relative_and_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KVARENA_RUNS", "runs")
    assert runs_folder() == tmp_path / "runs"
    monkeypatch.setenv("KVARENA_RUNS", "~/runs")
    assert runs_folder() == tmp_path / "home" / "runs"

"""Issue G, number 11: another user's machine, where the home, the checkout or the system gives nothing."""

import errno
import os
import pwd
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vmm import drivers, fragments
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.caches import own_folder, settle, shared_folder
from kvarena.errors import UserError
from kvarena.experiments.command.cli import USER_ERROR, guarded
from kvarena.harness.paths import ROOT
from kvarena.kernels import jit

POOL = 2 * MB
CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME", "FLASHINFER_WORKSPACE_BASE")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that nothing can be made in, which stops root too, and a folder of temporary files."""
    (tmp_path / "home").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that what is set is given back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run --user 12345`: no HOME, and no such user in /etc/passwd."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("home", ["unwritable", "none", "cache"])
def test_caches_of_a_user_without_a_home_go_to_one_folder(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    if home == "none":
        no_home(monkeypatch)
    elif home == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "home" / "cache"))
    settle()
    ours = machine / "tmp" / f"kvarena-{os.getuid()}"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert str(ours) in capsys.readouterr().err
    assert all(Path(os.environ[name]).is_relative_to(ours) for name in CACHES)
    settle()  # a second command finds it, and a child of the first has nothing to say
    assert (list((machine / "tmp").iterdir()), capsys.readouterr().err) == ([ours], "")


def test_a_user_with_a_home_keeps_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(machine))
    settle()
    assert own_folder() == machine / ".cache"
    assert not set(CACHES) & set(os.environ)
    assert capsys.readouterr().err == ""


def test_what_the_user_chose_stays(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    settle()
    assert os.environ["MPLCONFIGDIR"] == "/chosen"


@pytest.mark.parametrize("made", ["link", "open", "file"])
def test_nobody_elses_folder_is_trusted(machine: Path, made: str) -> None:
    """Machine code is loaded from there."""
    ours = machine / "tmp" / f"kvarena-{os.getuid()}"
    if made == "link":
        (machine / "elsewhere").mkdir()
        ours.symlink_to(machine / "elsewhere")
    elif made == "open":
        ours.mkdir()
        ours.chmod(0o777)
    else:
        ours.touch()
    assert shared_folder() is None


def test_where_nothing_can_be_written_it_is_said(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "tmp").rmdir()
    with pytest.raises(UserError, match="TMPDIR"):
        settle()
    no_home(monkeypatch)
    with pytest.raises(UserError, match="TMPDIR"):
        settle()


@pytest.mark.parametrize(("mask", "expected"), [(0o777, 0o077), (0o077, 0o077), (0o022, 0o022)])
def test_what_is_written_can_be_read_again(machine: Path, mask: int, expected: int) -> None:
    before = os.umask(mask)
    try:
        settle()
        assert os.umask(before) == expected
    finally:
        os.umask(before)


@pytest.mark.parametrize("temporary", [True, False])
def test_numba_compiles_wherever_it_may_keep_its_code(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], temporary: bool
) -> None:
    """Beside the source, below the home, among temporary files; and where none can be written, not at all."""
    (machine / "source").mkdir()
    (machine / "source" / "__pycache__").write_text("in the way")
    monkeypatch.setattr(jit, "_PACKAGE", machine / "source")
    jit.cache_folder.cache_clear()
    if not temporary:
        (machine / "tmp").rmdir()

    def total(values: np.ndarray) -> float:
        return values.sum() + 1

    try:
        assert jit.jit(total)(np.arange(4.0)) == 7
        folder = jit.cache_folder()
    finally:
        jit.cache_folder.cache_clear()
    said = capsys.readouterr().err
    if temporary:
        assert folder is not None
        assert folder.is_relative_to(machine / "tmp")
        assert [path.suffix for path in sorted(folder.rglob("*.nb?"))] == [".nbc", ".nbi"]
    assert ("compiles anew" in said) == (not temporary)


def test_a_full_disk_does_not_stop_numba(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder can be made and the first bytes written; then the quota is used up."""
    monkeypatch.setattr(jit, "cache_folder", lambda: machine / "tmp")
    jit._say.cache_clear()

    @jit.jit
    def total(values: np.ndarray) -> float:
        return values.sum() + 2

    with monkeypatch.context() as full:
        full.setattr("numba.core.caching.IndexDataCacheFile._save_data", refused(errno.ENOSPC))
        assert total(np.arange(4.0)) == 8
    assert total(np.arange(4)) == 8  # another signature, which is kept
    assert capsys.readouterr().err.count("compiles anew") == 1
    assert list((machine / "tmp").rglob("*.nbc"))


def refused(number: int) -> Callable[..., int]:
    """A system call that fails."""

    def call(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOSYS, errno.EPERM, errno.EMFILE, "absent", "fallocate", "ulimit -f"])
def without_memfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system where no memfd can hold a pool."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if request.param == "absent":
        monkeypatch.delattr(os, "memfd_create")
    elif request.param == "ulimit -f":
        resource.setrlimit(resource.RLIMIT_FSIZE, (POOL // 2, hard))
    elif request.param == "fallocate":
        monkeypatch.setattr(os, "posix_fallocate", refused(errno.EPERM))
    else:
        monkeypatch.setattr(os, "memfd_create", refused(request.param))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("without_memfd")
def test_a_resident_pool_needs_no_memfd(capsys: pytest.CaptureFixture[str]) -> None:
    drivers._say.cache_clear()
    for _ in range(2):
        driver = drivers.make_driver_of_one("cpu", POOL)
        base, handles = driver.reserve(2 * POOL), driver.create(1)
        driver.map(base, 0, handles)
        assert driver.mapped_bytes == driver.counted_bytes() == POOL
        memory = strided_tensor(driver, base, torch.int32, (POOL // 4,), (4,))
        assert not memory.any()
        memory[:] = 7
        assert int(memory.sum(dtype=torch.int64)) == 7 * POOL // 4
        driver.close()
    assert capsys.readouterr().err.count("anonymous memory") == 1


@pytest.mark.usefixtures("without_memfd")
def test_memory_on_demand_needs_one_and_says_why_there_is_none() -> None:
    with pytest.raises(UserError, match="memfd"), closing(drivers.make_driver("cpu", 64 * KB)) as driver:
        driver.create(POOL // (64 * KB))


@pytest.mark.usefixtures("without_memfd")
def test_fragments_are_not_held_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "scattered_bytes", lambda: POOL)
    with fragments.scattered_pages_held() as held:
        assert held == 0


def test_with_a_memfd_a_resident_pool_lies_in_it() -> None:
    with closing(drivers.make_driver_of_one("cpu", POOL)) as driver:
        assert type(driver) is HostDriver


def test_a_machine_without_the_memory_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def too_much_of_the_hosts() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    def too_much_of_pythons() -> None:
        bytes(1 << 62)

    def broken() -> None:
        raise RuntimeError("a bug")

    assert [guarded(command) for command in (too_much_of_the_hosts, too_much_of_pythons)] == [USER_ERROR] * 2
    assert capsys.readouterr().err.count("out of memory") == 2
    with pytest.raises(RuntimeError, match="a bug"):
        guarded(broken)


def test_a_checkout_that_cannot_be_written_keeps_no_caches_of_tools() -> None:
    """Where pytest could not make its cache, its warning would be an error."""
    with tempfile.TemporaryDirectory() as name:
        python = Path(name, "python")
        python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$RUFF_NO_CACHE,$MYPY_CACHE_DIR,$PYTEST_ADDOPTS"\n')
        python.chmod(0o755)
        shutil.copy(ROOT / "run.sh", name)
        Path(name).chmod(0o555)
        done = subprocess.run(
            [Path(name, "run.sh"), "test"], env={"KVARENA_PYTHON": str(python), "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True, user=None if os.geteuid() else 12345,
        )  # fmt: skip
    assert done.stdout.strip() == "true,/dev/null,-p no:cacheprovider"
    assert name in done.stderr

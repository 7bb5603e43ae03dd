"""run.sh, in a checkout of its own whose `kvarena` only reports how it was called.

Set-up is tested with an interpreter that merely notes what it is asked to do, and once with a real one.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash") or "/bin/bash"
FAILED_SET_UP = 3

REPORT = """\
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path, "omp": os.environ["OMP_WAIT_POLICY"],
                  "executable": sys.executable}))
sys.exit(int(os.environ.get("STATUS", "0")))
"""

# `-m venv DIR` puts a copy of this script there; $PIP is what an installation does.
NOTING_PYTHON = f"""\
#!{BASH}
case "$*" in
    '-m venv '*) echo venv >>"$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    '-m pip --version') ;;
    '-m pip install '*) echo "pip ${{*: -1}}" | sed 's:/.*/::' >>"$LOG"; eval "${{PIP:-:}}" ;;
    *ensurepip*) exit "${{WITHOUT_VENV:-0}}" ;;
    *) exec '{sys.executable}' "$@" ;;
esac
"""


class Checkout:
    """A checkout with its own run.sh, and a folder of programs that stands for PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # a blank in the path must not matter
        (self.root / "kvarena").mkdir(parents=True)
        shutil.copy(ROOT / "run.sh", self.root)
        (self.root / "kvarena" / "__init__.py").touch()
        (self.root / "kvarena" / "__main__.py").write_text(REPORT)
        (self.root / ".import").mkdir()
        (self.root / ".import" / "kvarena").symlink_to("../kvarena")
        for lock in ("requirements.lock", "requirements-dev.lock"):
            (self.root / lock).write_text("# nothing\n")
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in ("bash", "cp", "flock", "mkdir", "rm", "sed", "sh", "sleep"):
            if found := shutil.which(name):
                (self.programs / name).symlink_to(found)
        self.log = folder / "log"
        self.environment = {"PATH": str(self.programs), "LOG": str(self.log)}

    def add_python(self, name: str = "python3") -> None:
        program = self.programs / name
        program.write_text(NOTING_PYTHON)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BASH, self.root / "run.sh", *arguments],
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, cwd=cwd, **environment) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def deeds(self) -> list[str]:
        """What the noting interpreter was asked to do since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def with_python(checkout):
    checkout.add_python()
    return checkout


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_needs_no_environment(checkout, arguments):
    (checkout.root / "conf" / "experiment").mkdir(parents=True)
    (checkout.root / "conf" / "experiment" / "decode_throughput.yaml").touch()
    done = checkout.run(*arguments, PATH="/nonexistent")
    assert (done.returncode, done.stderr) == (0, "")
    assert "experiment=NAME" in done.stdout
    assert "experiments: decode_throughput\n" in done.stdout
    assert not (checkout.root / ".venv").exists()


def test_arguments_and_exit_code_pass_through(checkout):
    arguments = ["-m", "experiment=decode_throughput", "batch=1,2", "trace.path=a b.json", "x='$HOME'"]
    done = checkout.run(*arguments, KVARENA_PYTHON=sys.executable, STATUS="7")
    assert done.returncode == 7
    assert json.loads(done.stdout)["argv"] == arguments


def test_given_interpreter_is_used_as_it_is(checkout):
    done = checkout.run("kernels", KVARENA_PYTHON=sys.executable)
    report = json.loads(done.stdout)
    assert report["executable"] == sys.executable
    assert report["omp"] == "PASSIVE"
    assert sorted(p.name for p in checkout.root.iterdir() if p.name.startswith(".")) == [".import"]


def test_root_is_never_on_the_module_path(checkout):
    report = json.loads(checkout.run("kernels", KVARENA_PYTHON=sys.executable).stdout)
    assert str(checkout.root / ".import") in report["path"]
    assert not {str(checkout.root), ""} & set(report["path"])


def test_runs_from_any_folder_and_stays_there(checkout, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(checkout.root / "run.sh")
    (checkout.programs / "readlink").symlink_to(shutil.which("readlink"))
    done = checkout.run("kernels", cwd=elsewhere, KVARENA_PYTHON=sys.executable)
    assert json.loads(done.stdout)["cwd"] == str(elsewhere)
    linked = subprocess.run(
        [BASH, "link", "kernels"],
        cwd=elsewhere,
        env={**checkout.environment, "KVARENA_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(linked.stdout)["cwd"] == str(elsewhere)


@pytest.mark.parametrize("interpreter", ["/nonexistent/python3", "no-such-python", "/bin/false"])
def test_given_interpreter_that_does_not_run_is_refused(checkout, interpreter):
    done = checkout.run("kernels", KVARENA_PYTHON=interpreter)
    assert done.returncode == FAILED_SET_UP
    assert f"KVARENA_PYTHON={interpreter} is not a Python >= 3.11" in done.stderr


def test_environment_is_made_once_and_again_when_the_lock_changes(with_python):
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == ["venv", "pip requirements.lock"]
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == []
    (with_python.root / "requirements.lock").write_text("# something else\n")
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == ["pip requirements.lock"]
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == []


def test_tests_add_the_development_lock(with_python):
    with_python.run("kernels")
    with_python.deeds()
    with_python.run("test", "--version")
    assert with_python.deeds() == ["pip requirements-dev.lock"]
    with_python.run("test", "--version")
    assert with_python.deeds() == []


def test_killed_set_up_is_redone_from_nothing(with_python):
    killed = with_python.run("kernels", PIP=": >.venv/half-made; kill -9 $PPID")
    assert killed.returncode != 0
    assert (with_python.root / ".venv" / "half-made").exists()
    with_python.deeds()
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == ["venv", "pip requirements.lock"]
    assert not (with_python.root / ".venv" / "half-made").exists()


def test_failed_set_up_leaves_nothing_and_says_so(with_python):
    done = with_python.run("kernels", PIP="exit 1")
    assert done.returncode == FAILED_SET_UP
    assert "could not install requirements.lock" in done.stderr
    assert done.stdout == ""
    assert not list(with_python.root.glob(".venv*"))


def test_failed_change_of_the_lock_keeps_the_environment(with_python):
    with_python.run("kernels")
    (with_python.root / "requirements.lock").write_text("# something else\n")
    assert with_python.run("kernels", PIP="exit 1").returncode == FAILED_SET_UP
    with_python.deeds()
    assert with_python.run("kernels").returncode == 0
    assert with_python.deeds() == ["pip requirements.lock"]


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_first_runs_at_once_do_not_collide(with_python):
    first, second = (with_python.start("kernels", PIP="sleep 0.5") for _ in range(2))
    errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert with_python.deeds() == ["venv", "pip requirements.lock"]


def test_without_python_it_says_what_is_missing(checkout):
    done = checkout.run("experiment=decode_throughput")
    assert done.returncode == FAILED_SET_UP
    assert "no Python >= 3.11 found" in done.stderr
    assert not list(checkout.root.glob(".venv*"))


def test_without_the_venv_module_it_names_the_package(with_python):
    done = with_python.run("experiment=decode_throughput", WITHOUT_VENV="1")
    assert done.returncode == FAILED_SET_UP
    assert "python3-venv" in done.stderr


def test_interpreter_that_can_make_environments_is_preferred(with_python):
    (with_python.programs / "python3").write_text(NOTING_PYTHON.replace("${WITHOUT_VENV:-0}", "1"))
    with_python.add_python("python3.12")
    done = with_python.run("kernels")
    assert done.returncode == 0
    assert "with python3.12" in done.stderr


def test_real_interpreter_makes_a_real_environment(checkout):
    (checkout.programs / "python3").symlink_to(sys.base_prefix + "/bin/python3")
    done = checkout.run("kernels", HOME=os.environ.get("HOME", "/"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["executable"] == str(checkout.root / ".venv" / "bin" / "python")

"""The kit: what it gathers, what it weighs, and that what was packed is what is found there."""

import argparse
import lzma
import os
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation import command, kit

FAKE_SO = bytes(range(256)) * 64


@pytest.fixture
def offline(monkeypatch):
    """No package index and no compiler: pip leaves a wheel of each package that it is asked for. Holds its calls."""
    calls = []

    def run(command, environment):
        calls.append(command)
        if "pip" not in command:
            name = "batch_prefill"
            Path(command[-1], name).mkdir(parents=True)
            Path(command[-1], name, f"{name}.so").write_bytes(FAKE_SO)
            return
        target = Path(command[1 + max(i for i, word in enumerate(command) if word in ("-w", "-d", "--target"))])
        target.mkdir(parents=True, exist_ok=True)
        for package in (word for word in command if word.split("==")[0] in NAMES):
            name = package.split("==")[0].replace("-", "_")
            with zipfile.ZipFile(target / f"{name}-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", f"NAME = {name!r}\n")
                if package == kit.VLLM:
                    wheel.writestr(kit.FA3, FAKE_SO)

    NAMES = {each.split("==")[0] for each in (*kit.WHEELS, *kit.FLASHINFER, kit.VLLM)}
    monkeypatch.setattr(kit, "_run", run)
    return calls


def asked(out, **other):
    given = {"out": out, "max_mib": 64, "earlier": None, "fa3": None, "without": ["flashinfer"]}
    return argparse.Namespace(**given | other)


def test_the_checkout_travels_without_results_that_were_measured(offline, tmp_path, capsys):
    assert kit.make(asked(tmp_path / "kit", without=["fa3", "flashinfer"]))
    out = tmp_path / "kit"
    assert (out / "run.sh").is_file()
    assert os.access(out / "run.sh", os.X_OK)
    assert (out / "kvarena" / "kernels").is_symlink()
    assert (out / "results" / "published").is_dir()
    assert [path.name for path in (out / "results").iterdir()] == ["published"]
    assert not (out / ".git").exists()
    sizes = {line.split("MiB", 1)[1].strip(): float(line.split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert sizes["all (of 64 MiB)"] == pytest.approx(kit.size(out) / (1 << 20), abs=0.01)
    assert sizes["all (of 64 MiB)"] == pytest.approx(sum(sizes.values()) / 2, abs=0.05)


def test_what_was_packed_is_what_is_found_there(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(kit.shutil, "which", lambda name: "/usr/bin/nvcc")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "validation.jsonl").write_text("")
    kit.make(asked(tmp_path / "out", without=[], earlier=earlier))
    there = tmp_path / "out" / "kit"
    assert {path.name for path in there.iterdir()} == {"wheels", "fa3.so.xz", "flashinfer", "earlier", "commit"}
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("KVARENA_FA3_SO", "KVARENA_COMMIT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    kit.unpacked(there, tmp_path / "scratch")
    site = Path(sys.path[-1])
    assert Path(os.environ["KVARENA_FA3_SO"]).read_bytes() == FAKE_SO
    assert len(os.environ["KVARENA_COMMIT"]) == 40
    assert {"hydra_core", "omegaconf", "antlr4_python3_runtime", "flashinfer_python"} <= {
        p.name for p in site.iterdir()
    }
    built = site / "flashinfer" / "data" / "aot" / "batch_prefill" / "batch_prefill.so"
    assert built.read_bytes() == FAKE_SO  # where FlashInfer looks before it would compile


def test_the_steps_are_imported_once_the_kit_is_ready(tmp_path, monkeypatch):
    wheels = tmp_path / "kit" / "wheels"
    wheels.mkdir(parents=True)
    (tmp_path / "kit" / "commit").write_text("")
    with zipfile.ZipFile(wheels / "brought.whl", "w") as wheel:
        wheel.writestr("brought_by_the_kit.py", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(command, "_asked", lambda given, records: import_module("brought_by_the_kit") and [])
    for arguments in (["--list"], ["--device", "cpu", "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as left:
            command.main([*arguments, "--kit", str(tmp_path / "kit")])
        assert left.value.code == 0
        del sys.modules["brought_by_the_kit"]
        sys.path.pop()
        with pytest.raises(SystemExit) as left:
            command.main(arguments)
        assert left.value.code == 2


def test_without_a_compiler_flashinfer_stays_at_home(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kit.shutil, "which", lambda name: None)
    kit.make(asked(tmp_path / "out", without=["fa3"]))
    assert "stays at home" in capsys.readouterr().err
    assert not [call for call in offline if any("flashinfer" in word for word in call)]


def test_a_library_at_hand_is_not_fetched(offline, tmp_path):
    (tmp_path / "fa3.so").write_bytes(FAKE_SO)
    kit.make(asked(tmp_path / "out", fa3=tmp_path / "fa3.so"))
    assert lzma.decompress((tmp_path / "out" / "kit" / "fa3.so.xz").read_bytes()) == FAKE_SO
    assert not [call for call in offline if kit.VLLM in call]


def test_more_than_may_travel_is_said(offline, tmp_path):
    assert not kit.make(asked(tmp_path / "out", max_mib=1, without=["fa3", "flashinfer"]))


def test_mistakes(offline, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(SystemExit) as left:
        kit.main(["--out", str(tmp_path / "full")])
    assert left.value.code == 2
    assert "is not an empty folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no wheels/"):
        kit.unpacked(tmp_path / "full", tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="pip nosuchverb ended with"):
        kit._run([sys.executable, "-m", "pip", "nosuchverb"], dict(os.environ))


def test_the_copy_runs_where_there_is_no_git_history(offline, tmp_path):
    """As the two commands of docs/gpu.md do."""
    kit.make(asked(tmp_path / "out", without=["fa3", "flashinfer"]))
    told = {"KVARENA_PYTHON": sys.executable, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        ["./run.sh", "gpu-validation", "--kit", "kit", "--out", str(tmp_path / "results"), "--plan", "1",
         "--device", "cpu", "--case", "copy"],
        cwd=tmp_path / "out", env=told, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bandwidth: copy: passed" in done.stderr
    commit = (tmp_path / "out" / "kit" / "commit").read_text()
    assert f'"commit": "{commit[:12]}"' in (tmp_path / "results" / "validation.jsonl").read_text()

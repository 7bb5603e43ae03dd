"""`./run.sh gpu-kit --out DIR`: what to bring to a machine with a GPU and without a network.

    DIR/                the checkout as git knows it, without results/ but for results/published/
    DIR/kit/wheels/     Hydra and what it needs; FlashInfer too where its kernels could be built
    DIR/kit/fa3.so.xz   FlashAttention 3, out of vLLM's wheel
    DIR/kit/flashinfer/ its kernels, built here for Hopper, since nobody has minutes for that there
    DIR/kit/earlier/    an earlier session's folder, to go on from
    DIR/kit/commit      of the checkout

There, in DIR: `./run.sh gpu-validation --kit kit --out OUT --plan 1`. `unpacked` makes it ready.
"""

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import ROOT
from kvarena.harness.record.code_state import git_state

WHEELS = ("hydra-core==1.3.8", "omegaconf==2.3.1", "antlr4-python3-runtime==4.9.3")  # the last one is built
FLASHINFER = ("flashinfer-python==0.6.8.post1", "apache-tvm-ffi", "nvidia-ml-py")
IMPORTED = ("requests", "urllib3", "idna", "certifi", "charset-normalizer", "tqdm", "packaging", "filelock")  # by it
VLLM = "vllm==0.20.2"  # fits torch 2.11
FA3 = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
_PLATFORMS = ("manylinux_2_35_x86_64", "manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
_THERE = ["--only-binary=:all:", "--python-version=3.12", *(f"--platform={platform}" for platform in _PLATFORMS)]
# What `kernels/libraries/flashinfer.py` asks of FlashInfer on Hopper: heads of 128, no window, no cap.
_BUILD = """
import shutil, sys, torch
from pathlib import Path
from flashinfer.jit.attention import gen_batch_prefill_module
for backend in ("fa2", "fa3"):
    for dtype in (torch.bfloat16, torch.float16):
        spec = gen_batch_prefill_module(backend, *[dtype] * 3, torch.int32, 128, 128, 0, False, False, False)
        spec.build(verbose=False)
        folder = Path(sys.argv[1], spec.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.jit_library_path, folder / f"{spec.name}.so")
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the kit and say what it weighs, or say what is wrong with the command."""
    parser = argparse.ArgumentParser(
        prog="./run.sh gpu-kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or none yet")
    parser.add_argument("--max-mib", type=int, default=64, metavar="N", help="that may travel (64)")
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="an earlier session's folder, to be resumed")
    parser.add_argument("--fa3", type=Path, metavar="SO", help="vLLM's library, where it is at hand already")
    parser.add_argument(
        "--without", action="append", default=[], choices=("fa3", "flashinfer"), help="leave it at home; repeatable"
    )
    given = parser.parse_args(arguments)
    try:
        sys.exit(0 if make(given) else 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make(given: argparse.Namespace) -> bool:
    """Gather everything; prints the sizes. Returns whether they are within the limit."""
    out: Path = given.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an empty folder")
    kit = out / "kit"
    (kit / "wheels").mkdir(parents=True)
    copy_tree(out)
    _pip("wheel", "-w", kit / "wheels", *WHEELS)
    if "fa3" not in given.without:
        _pack_fa3(given.fa3, kit / "fa3.so.xz")
    if "flashinfer" not in given.without:
        _pack_flashinfer(kit)
    if given.earlier is not None:
        shutil.copytree(given.earlier, kit / "earlier")
    (kit / "commit").write_text(str(git_state()["commit"] or ""))
    return report(out, given.max_mib)


def copy_tree(out: Path) -> None:
    """Copy what git knows, and what it does not ignore, without results that were measured."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        raise UserError(f"{ROOT}: is no git checkout, so there is no telling what belongs to it")
    for name in map(Path, filter(None, listed.stdout.decode().split("\0"))):
        measured = name.parts[0] == "results" and name.parts[1] != "published"
        if (ROOT / name).exists() and not measured:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, out / name, follow_symlinks=False)


def report(out: Path, max_mib: int) -> bool:
    """Print what each part weighs, and all of it against the limit."""
    kit = out / "kit"
    parts = {"checkout": size(out) - size(kit)} | {f"kit/{each.name}": size(each) for each in sorted(kit.iterdir())}
    for name, num_bytes in {**parts, f"all (of {max_mib} MiB)": sum(parts.values())}.items():
        print(f"{num_bytes / (1 << 20):8.2f} MiB  {name}")
    return sum(parts.values()) <= max_mib << 20


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


def _pack_fa3(library: Path | None, target: Path) -> None:
    """Compress FlashAttention 3: 152 MB become 7."""
    if library is not None:
        target.write_bytes(lzma.compress(library.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        return
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "-d", Path(folder), *_THERE, VLLM)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(lzma.compress(archive.read(FA3), preset=9 | lzma.PRESET_EXTREME))


def _pack_flashinfer(kit: Path) -> None:
    """FlashInfer with its kernels built; without nvcc it stays at home, kernels and all."""
    if shutil.which("nvcc") is None:
        print("flashinfer: stays at home, there is no nvcc here to build its kernels", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        _pip("install", "--target", site, *FLASHINFER, *IMPORTED)  # for this Python
        told = {"PYTHONPATH": str(site), "FLASHINFER_CUDA_ARCH_LIST": "9.0a", "FLASHINFER_WORKSPACE_BASE": folder}
        _run([sys.executable, "-c", _BUILD, str(kit / "flashinfer")], os.environ | told)
    _pip("download", "-d", kit / "wheels", *_THERE, *FLASHINFER)


def _pip(verb: str, *arguments: object) -> None:
    _run([sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", *map(str, arguments)], dict(os.environ))


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"gpu-kit: {' '.join(command[1:4])} ended with {done.returncode}: {last}")


def _unzip(wheels: Path, site: Path) -> None:
    """A wheel is an archive of what is to be imported."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def unpacked(kit: Path, scratch: Path) -> None:
    """Make a kit ready in this process and those that it forks. Raises UserError where there is none."""
    if not (kit / "wheels").is_dir():
        raise UserError(f"--kit {kit}: holds no wheels/, so it is not what ./run.sh gpu-kit makes")
    site = scratch / "site"
    _unzip(kit / "wheels", site)
    if (kit / "flashinfer").is_dir():  # where FlashInfer looks for kernels that came with it
        shutil.copytree(kit / "flashinfer", site / "flashinfer" / "data" / "aot")
    sys.path.append(str(site))  # what the machine has itself goes first
    if (kit / "fa3.so.xz").is_file():
        library = scratch / "fa3.so"
        library.write_bytes(lzma.decompress((kit / "fa3.so.xz").read_bytes()))
        os.environ["KVARENA_FA3_SO"] = str(library)
    if commit := (kit / "commit").read_text().strip():
        os.environ.setdefault("KVARENA_COMMIT", commit)

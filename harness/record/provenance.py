"""Where a number comes from: code, libraries, machine, configuration, command."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from typing import Any

from kvarena.harness.paths import ROOT

_LIBRARIES = ("torch", "numpy", "numba", "pandas", "triton", "vllm", "flash-attn", "flashinfer-python", "cuda-bindings")


@cache
def git_state() -> dict[str, Any]:
    """Commit, whether the tree is dirty, and a hash of what is uncommitted.

    Outside a git checkout the commit is what KVARENA_COMMIT says (a copy that was taken to another machine has no
    history), and whether the copy was changed is not known: None.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("KVARENA_COMMIT"), "dirty": None, "diff_sha256": None}
    # Results and notebooks are outputs: writing them must not change the identity of the code that wrote them.
    code = (":(exclude)results", ":(exclude)notebooks")
    diff = _git("diff", "HEAD", "--", ".", *code) or ""
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", ".", *code) or ""
    changed = "\n".join(filter(None, (diff, *(_file_hash(name) for name in untracked.splitlines()))))
    return {
        "commit": commit,
        "dirty": bool(changed),
        "diff_sha256": hashlib.sha256(changed.encode()).hexdigest() if changed else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _file_hash(name: str) -> str:
    path = ROOT / name
    return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else name


@cache
def libraries() -> dict[str, str]:
    """Versions of the libraries that make numbers; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def machine() -> dict[str, Any]:
    """Processor, cores, memory, kernel, and the GPU where there is one."""
    import torch

    description: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        description["gpu"] = properties.name
        description["gpu_memory_bytes"] = properties.total_memory
        description["cuda"] = torch.version.cuda
        description["gpu_driver"] = _nvidia_driver()
    return description


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia_driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return None


def identity(config: dict[str, Any]) -> str:
    """Hash of everything that must agree for an unfinished run to be continued."""
    parts = {"config": config, "git": git_state(), "libraries": libraries(), "machine": machine()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def provenance(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The record written beside every result."""
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "git": git_state(),
        "libraries": libraries(),
        "machine": machine(),
        "config": config,
        **more,
    }

"""Where a number comes from: code, libraries, machine, configuration, command."""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from functools import cache
from typing import Any

from kvarena.harness.record.code_state import git_state

_LIBRARIES = ("torch", "numpy", "numba", "pandas", "triton", "vllm", "flash-attn", "flashinfer-python", "cuda-bindings")


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

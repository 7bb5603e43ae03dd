"""What control groups leave this process: a container's, a batch job's or a service's share of the machine.

A limit may stand at any group from the process's own up to the root, and the smallest counts. Both versions are read,
and a machine may mount both: of each controller, wherever it is. What is absent or unlimited limits nothing.
"""

import os
from functools import cache
from pathlib import Path

_ROOT = Path("/")


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that may still become resident before the first group is full; None where no group has a limit.

    Pages of files that nobody used of late count as free: the kernel drops them before it kills.
    """
    left = [
        limit - max(0, use - _stated(group / "memory.stat", cached))
        for group in _groups("memory", root)
        for limits, used, cached in (
            (("memory.max", "memory.high"), "memory.current", "inactive_file"),
            (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
        )
        if (use := _number(group / used)) is not None
        for limit in map(_number, (group / name for name in limits))
        if limit is not None
    ]
    return max(0, min(left)) if left else None


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the process may use; None where no group has a quota."""
    quotas = [quota for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    return min(quotas) if quotas else None


def _quota(group: Path) -> float | None:
    """A group's own: `200000 100000` is two processors; version 2 says `max`, version 1 says -1 for none."""
    words = _text(group / "cpu.max").split() or [
        _text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    numbers = [int(word) for word in words if word.isdigit()]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else None


@cache  # a process is moved to another group before it begins, if at all
def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of the process's groups of a controller, its own first, in every hierarchy that may have it."""
    paths = {
        name: path
        for _, names, path in (line.split(":", 2) for line in _lines(root / "proc/self/cgroup") if line.count(":") > 1)
        for name in names.split(",")
    }
    groups: list[Path] = []
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        fields, (version, *_, options) = mount.split(), kind.split() or [""]
        name = "" if version == "cgroup2" else controller
        has_it = version == "cgroup2" or (version == "cgroup" and controller in options.split(","))
        if has_it and name in paths:
            mounted, top = (_unescaped(field) for field in fields[3:5])
            own = (root / top.lstrip("/")).joinpath(*_below(paths[name], mounted))
            groups += [each for each in (own, *own.parents) if each.is_relative_to(root / top.lstrip("/"))]
    return groups


def _below(path: str, mounted: str) -> tuple[str, ...]:
    """Names from what is mounted down to a group; none where the group is seen from outside of it, `/..`."""
    inner, outer = Path(path), Path(mounted)
    return inner.relative_to(outer).parts if inner.is_relative_to(outer) and ".." not in inner.parts else ()


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which a blank is written as \\040."""
    return os.fsdecode(os.fsencode(field).decode("unicode_escape").encode("latin-1"))


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _stated(file: Path, key: str) -> int:
    """A line `key number` of a file; 0 where it has none."""
    return next((int(line.split()[1]) for line in _lines(file) if line.startswith(f"{key} ")), 0)


def _lines(file: Path) -> list[str]:
    return _text(file).splitlines()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""

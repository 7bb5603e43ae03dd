"""Write the lock files anew from what this environment holds: `./run.sh lock`.

To move a pin: `.venv/bin/python -m pip install --upgrade NAME`, run the tests, `./run.sh lock`, commit. The lock is
thus what the tests ran with. It pins everything that `[project] dependencies` (and, in the second file, the extra
`dev`) of pyproject.toml needs, transitively. Left out are local versions (`+cpu`) and what a CUDA build of torch
brings along, which torch pins exactly itself.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
BROUGHT_BY_TORCH = ("nvidia-", "cuda-", "triton")
LINUX_ONLY = {
    "cuda-bindings": 'platform_system == "Linux"',
    "cuda-pathfinder": 'platform_system == "Linux"',
    "triton": 'platform_system == "Linux" and platform_machine == "x86_64"',
}
HEADER = "# Exact versions for Python 3.11 and 3.12. Written by `./run.sh lock`, which says how to move a pin.\n"


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """Whether a requirement's marker holds on any of our Pythons, on this machine, with any of the extras."""
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({"python_version": python, "python_full_version": f"{python}.0", "extra": extra})
        for python in PYTHONS
        for extra in {"", *extras}
    )


def closure(requirements: list[str]) -> dict[str, Version]:
    """Name and installed version of every distribution that the requirements need, themselves included."""
    wanted = [Requirement(line) for line in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    versions: dict[str, Version] = {}
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        installed = distribution(name)
        versions[name] = Version(installed.version)
        needs = [Requirement(line) for line in installed.requires or ()]
        is_torch = name == "torch"
        wanted += [
            need
            for need in needs
            if applies(need, requirement.extras) and not (is_torch and need.name.startswith(BROUGHT_BY_TORCH))
        ]
    return versions


def lines(versions: dict[str, Version]) -> str:
    """The pins, sorted by name, one a line."""
    pins = []
    for name, version in sorted(versions.items()):
        marker = f" ; {LINUX_ONLY[name]}" if name in LINUX_ONLY else ""
        pins.append(f"{name}=={version.public}{marker}\n")
    return "".join(pins)


def main() -> None:
    """Write requirements.lock and requirements-dev.lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = closure(project["dependencies"])
    every = closure([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    additions = {name: version for name, version in every.items() if name not in runtime}
    (ROOT / "requirements.lock").write_text(HEADER + lines(runtime))
    (ROOT / "requirements-dev.lock").write_text(HEADER + "-r requirements.lock\n" + lines(additions))


if __name__ == "__main__":
    main()

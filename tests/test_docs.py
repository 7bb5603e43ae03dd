"""What the pages name exists: files, links, keys and choices of the configuration, commands (composed, not run)."""

import re
import shlex
from pathlib import Path

import pytest

from kvarena.experiments.command.compose import compose_run
from kvarena.harness.config import load, names
from kvarena.harness.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("allocators", "benchmarks", "conf", "docs", "experiments", "harness", "kernels", "kvarena", "notebooks",
           "results", "tests", ".ci", ".github")  # fmt: skip
MADE = (  # by a run, or by who reads the page
    "results/runs/", "results/h200/", "results/baselines/gpu-", "results/report.html", "report.html", "summary.csv",
    "config.yaml", "provenance.json", "trace.json", "steps.html", "figures.json", "figures.bigger.json", "matrix.md",
    "environment.json", "wmt16_prefix.json",
)  # fmt: skip
FILE = re.compile(r"[\w./*-]+\.(?:py|yaml|yml|md|csv|json|ipynb|html)\b")
COMMAND = re.compile(r"\./run\.sh ((?:-m )?experiment=[^#`\n]*)")
GROUPS = ("trace", "arrival", "scheduler", "engine", "decoding", "model", "allocator", "device")
KEY = re.compile(rf"\b({'|'.join(GROUPS)})\.([a-z]\w*)")
CHOICE = re.compile(rf"\b({'|'.join(GROUPS)})=([a-z][\w-]*)")


def quoted(page: Path) -> list[str]:
    """What a page sets in backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def exists(name: str, page: Path) -> bool:
    """Whether it is a path of the project or below one of its folders, beside the page, or the name of some file."""
    if "/" in name:
        below = any((ROOT / folder / name).exists() for folder in FOLDERS)
        return below or any(ROOT.glob(name)) or (page.parent / name).exists()
    return (ROOT / name).exists() or any(any((ROOT / folder).rglob(name)) for folder in FOLDERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_of_a_page_exist(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if not link.startswith("http")]
    files = {name for part in quoted(page) for name in FILE.findall(part) if "NAME" not in name}
    named = [*links, *(name for name in files if not name.startswith((*MADE, "DIR/")))]
    assert not [name for name in named if not exists(name, page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_choices_of_a_page_exist(page: Path) -> None:
    for part in quoted(page) + commands(page):
        for group, key in KEY.findall(part):
            if f"{group}.{key}" in MADE or key in ("yaml", "py"):
                continue
            stated = [load(group, name) for name in names(group)]
            stated += [load("base", group)] if group in names("base") else []
            assert any(key in each for each in stated), f"{group}.{key} of {page.name}"
        for group, name in CHOICE.findall(part):
            assert name in names(group), f"{group}={name} of {page.name}"


def commands(page: Path) -> list[str]:
    """The command lines of a page that run an experiment."""
    found = COMMAND.findall(page.read_text().replace("\\\n", " "))
    return [command.strip(" *.,") for command in found if "NAME" not in command]


ALL_COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_a_command_composes(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "-m":  # the first of each list of values
        words = [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in words[1:]]
    assert compose_run(*words).experiment in names("experiment")


def test_the_pages_have_commands() -> None:
    assert len(ALL_COMMANDS) > 8

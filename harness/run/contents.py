"""The files that a run's numbers depend on, beside the project's own: runs are one only where these hold the same."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvarena.harness.files.content import REVISION, hashes
from kvarena.harness.files.hub_name import is_hub_name
from kvarena.harness.trace.file_trace import read_with
from kvarena.kernels.registry import kernel_spec

if TYPE_CHECKING:
    from kvarena.harness.run.run import Run

_OF_CHECKPOINT = ("config.json", "*.safetensors", "*.safetensors.index.json")


@runtime_checkable
class ReadsFiles(Protocol):
    """Params of an experiment that replays several traces."""

    @property
    def paths(self) -> Mapping[str, str | None]:
        """The local file of each trace; None: its table."""


def contents(run: "Run[object]") -> dict[str, str]:
    """The hash of each file that the run reads, by path; of a name on the hub its revision, where that is known."""
    return {**hashes(_traces(run)), **hashes(_others(run), "file"), **dict(_revisions(run))}


def _others(run: "Run[object]") -> Iterator[str]:
    """What traces are read with, the weights that are computed with, and libraries of kernels that a variable names."""
    for path in _traces(run):
        yield from read_with(replace(run.trace, path=path))
    if _checkpoint(run) is not None:
        folder = Path(str(run.model.checkpoint)).expanduser()
        yield from (str(file) for pattern in _OF_CHECKPOINT for file in sorted(folder.glob(pattern)))
    if run.clock == "measured":
        variables = (kernel_spec(system.kernel.name).library_variable for system in run.systems)
        yield from (os.environ[variable] for variable in variables if os.environ.get(variable))


def _traces(run: "Run[object]") -> list[str]:
    more = run.params.paths.values() if isinstance(run.params, ReadsFiles) else ()
    return [path for path in (run.trace.path, *more) if path is not None]


def _checkpoint(run: "Run[object]") -> str | None:
    """Whose weights are computed with; under the modelled clock none are, and its sizes stand in the configuration."""
    return run.model.checkpoint if run.clock == "measured" else None


def _revisions(run: "Run[object]") -> Iterator[tuple[str, str]]:
    named = [("dataset", path) for path in _traces(run)]
    named += [("model", name) for name in (run.trace.tokenizer, _checkpoint(run)) if name is not None]
    for kind, name in named:
        if is_hub_name(name) and not Path(name).exists():
            found = _revision(name, kind)
            if found is not None:
                yield name, f"{REVISION}{found}"


def _revision(name: str, kind: str) -> str | None:
    """What the hub says that `main` is now; where it cannot be asked, what was last downloaded; else None."""
    from huggingface_hub import HfApi, constants  # half a second, for hub names alone
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=10).sha
    except HFValidationError:
        return None
    except Exception:  # no network, no such name, no access: whoever loads it says so
        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / "main"
        return cached.read_text().strip() if cached.is_file() else None

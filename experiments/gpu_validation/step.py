"""A step: cases that one child process runs one after the other, and how long they may take."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from kvarena.experiments.gpu_validation.record import Values


@dataclass(frozen=True)
class Context:
    """What a case is told."""

    device: str  # "cuda", or "cpu" for a rehearsal with the CPU's kernels and the host's driver
    folder: Path  # where the results go
    scratch: Path  # for everything else; runs/ in it is kept

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"


class _Module(Protocol):
    """What a module under steps/ offers."""

    def cases(self, device: str) -> list[str]: ...

    def run(self, case: str, context: Context) -> Values: ...


@dataclass(frozen=True)
class Step:
    """`module` offers `cases(device) -> list[str]` and `run(case, context) -> Values`.

    A case that does not come back with values raises: FailedError, NotRunError, or whatever went wrong.
    """

    name: str
    about: str
    limit_s: float  # of the whole step
    case_limit_s: float
    module: str = ""  # under steps/; "" is that of the same name

    def cases(self, device: str) -> list[str]:
        """Names of the cases, in the order in which they run."""
        return self._imported().cases(device)

    def run(self, case: str, context: Context) -> Values:
        """Run one case in this process."""
        return self._imported().run(case, context)

    def _imported(self) -> "_Module":
        name = self.module or self.name.replace("-", "_")
        return cast(_Module, importlib.import_module(f"kvarena.experiments.gpu_validation.steps.{name}"))

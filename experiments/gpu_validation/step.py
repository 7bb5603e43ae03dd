"""A step: cases that one process runs one after the other."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from kvarena.errors import UserError
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
    """A module under steps/ that offers `cases(device) -> list[str]` and `run(case, context) -> Values`, and where it
    reaches files by name, `uses(case) -> list[str]`: modules, or files and folders of the checkout.

    A case that does not come back with values raises: FailedError, NotRunError, or whatever went wrong.
    """

    name: str
    about: str

    @property
    def module(self) -> str:
        """Its dotted name."""
        return f"kvarena.experiments.gpu_validation.steps.{self.name.replace('-', '_')}"

    def cases(self, device: str) -> list[str]:
        """Names of the cases, in the order in which they run."""
        return self._imported().cases(device)

    def run(self, case: str, context: Context) -> Values:
        """Run one case in this process."""
        return self._imported().run(case, context)

    def uses(self, case: str) -> Iterable[str]:
        """What a case uses that the module's imports do not show."""
        uses = getattr(self._imported(), "uses", lambda case: ())
        return cast(Iterable[str], uses(case))

    def _imported(self) -> "_Module":
        return cast(_Module, importlib.import_module(self.module))


STEPS = (
    Step("environment", "versions, GPU, driver, which kernels are there"),
    Step("driver-contract", "the tests of the virtual-memory driver and of the stores that are marked gpu"),
    Step("addresses", "tensors over reserved addresses, and what the driver's documentation leaves open"),
    Step("edge", "whether a kernel touches memory past the mapped end of a row"),
    Step("kernels", "every kernel against float64 on fresh random inputs: rows, blocks in order, shuffled"),
    Step("bandwidth", "a read-only reduction, a copy, a matrix product"),
    Step("sweep", "GB/s of decode attention by batch and context, beside the reduction"),
    Step("decode", "decode throughput, one kernel over static, paged and vAttention memory"),
    Step("replay", "a small trace served end to end: every allocator yields the same tokens"),
    Step("overlap", "mapping beside the forward pass, and without"),
    Step("copies", "copies of blocks in one launch, and one by one"),
    Step("tiles", "shapes of one program of our kernel, at the goal's batch and context"),
    Step("graphs", "decode steps captured in CUDA graphs"),
    Step("latencies", "vAttention Tables 3 and 9"),
    Step("prefill", "prefill throughput, one kernel over static, paged and vAttention memory"),
    Step("models", "the papers' models, their weights drawn on the device"),
)


def step_named(name: str) -> Step:
    """A step by its name. Raises UserError with the names that exist."""
    for step in STEPS:
        if step.name == name:
            return step
    raise UserError(f"--only {name}: no such step. There are: {', '.join(step.name for step in STEPS)}")

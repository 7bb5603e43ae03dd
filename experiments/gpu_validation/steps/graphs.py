"""Decode steps captured in CUDA graphs: each kernel alone, and the whole forward pass of every allocator.

Tokens could not say whether a replay is right: a graph cuts the attention's work for a longer longest sequence, so its
sums round otherwise, and a random model's tokens soon differ for that alone. So every step is run both ways.
"""

from functools import cached_property

from torch import Tensor

from kvarena.experiments.gpu_validation.record import FailedError, NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.driver_contract import run_tests
from kvarena.experiments.gpu_validation.steps.served import ALLOCATORS, make_run, serve
from kvarena.experiments.gpu_validation.steps.served import uses as replay_uses
from kvarena.harness.measured.decode_graphs import DecodeGraphs
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model.build import build_model
from kvarena.harness.paths import ROOT
from kvarena.harness.scheduler.step import StepPlan
from kvarena.kernels.view import BatchView

KERNELS_ALONE = "kernels alone"
_TESTS = "tests/kernels/test_gpu_adapters_on_gpu.py"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest logit


def cases(device: str) -> list[str]:
    """The allocators, then the tests of the kernels alone."""
    return [*ALLOCATORS, KERNELS_ALONE]


def uses(case: str) -> list[str]:
    """The replay's files, or the tests and every kernel."""
    return [_TESTS, "kernels"] if case == KERNELS_ALONE else replay_uses(case)


def run(case: str, context: Context) -> Values:
    """Serve a small trace; in every decode step a replayed graph must give the step's own logits."""
    if case == KERNELS_ALONE:
        if not context.on_gpu:
            raise NotRunError("there are no CUDA graphs on a CPU")
        return run_tests([ROOT / _TESTS], ["-k", "captured"], context)
    run = make_run(context)
    system = run.systems[ALLOCATORS.index(case)]
    both = serve(run, system, build_model(run.model, context.device), 1.25, BothWays).executor
    assert isinstance(both, BothWays)
    if not both.gap <= TOLERANCE[run.model.dtype]:
        raise FailedError(f"a replayed step is off by {both.gap:.2e} of its largest logit")
    return {"largest gap of a logit": float(f"{both.gap:.2e}"), "graphs": len(both.graphs), "replays": both.replays}


class BothWays(TorchExecutor):
    """Runs every decode step as it is, and as a graph: writing the same K/V twice changes nothing."""

    gap, replays = 0.0, 0

    @cached_property
    def graphs(self) -> DecodeGraphs:
        """One for each size of batch."""
        return DecodeGraphs(self.kernel, self.model.device, self.model.config.max_tokens)

    def _forward(self, plan: StepPlan, views: tuple[BatchView | None, BatchView | None]) -> Tensor:
        plain = super()._forward(plan, views)
        if views[0] is not None and views[1] is None:
            fed = [self.known(request)[request.computed] for request in plan.decodes]
            replayed = self.graphs.run(self._decode_step, fed, views[0], self.store.layer(0))
            self.gap = max(self.gap, float((replayed - plain).abs().max() / plain.abs().max()))
            self.replays += 1
        return plain

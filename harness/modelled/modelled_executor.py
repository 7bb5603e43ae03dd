"""The modelled clock: a step takes as long as a step model says, plus what the allocator's actions cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.allocators.policy import Action, CopyBlock, CopyRow, Map, SwapIn, SwapOut, Unmap
from kvarena.errors import UserError
from kvarena.harness.decoding.survival import survivors
from kvarena.harness.modelled.step_model import FOREVER, SteadyRun, StepLoad, StepModel
from kvarena.harness.requests.group import Group
from kvarena.harness.scheduler.step import Executor, StepPlan, StepTime


@dataclass(frozen=True, slots=True)
class ActionPrices:
    """Picoseconds of one action; maps by layer group. What has no price must not be decided."""

    copy_block_ps: int | None = None
    swap_out_ps: int | None = None
    swap_in_ps: int | None = None
    map_ps: tuple[int, ...] = ()
    unmap_ps: tuple[int, ...] = ()
    copy_row_fs: tuple[int, ...] = ()  # femtoseconds of one byte of a row, in every tensor of the layer group

    def total_ps(self, actions: Sequence[Action]) -> int:
        """Time of these actions, one after the other. Raises UserError for one that has no price."""
        return sum(map(self._price_ps, actions))

    def _price_ps(self, action: Action) -> int:
        price_ps: int | None = None
        match action:
            case Map() if self.map_ps:
                price_ps = self.map_ps[action.group]
            case Unmap() if self.unmap_ps:
                price_ps = self.unmap_ps[action.group]
            case CopyBlock():
                price_ps = self.copy_block_ps
            case CopyRow() if self.copy_row_fs:
                price_ps = (action.stop - action.start) * self.copy_row_fs[action.group] // 1000
            case SwapOut():
                price_ps = self.swap_out_ps
            case SwapIn():
                price_ps = self.swap_in_ps
        if price_ps is None:
            raise UserError(
                f"an allocator decided a {type(action).__name__}, and has not said how large it is: a policy with "
                "blocks states `block_size`, one that maps rows its `geometries`"
            )
        return price_ps


class _Free(ActionPrices):
    """What actions cost where nobody prices them."""

    def total_ps(self, actions: Sequence[Action]) -> int:
        return 0


FREE = _Free()


class ModelledExecutor(Executor):
    """Prices plans. Holds no state: the same plan always takes the same time. Without prices actions take none."""

    def __init__(self, model: StepModel, prices: ActionPrices | None = None) -> None:
        self.model = model
        self.prices = prices or FREE
        self._moved_ps = max(self.prices.map_ps, default=0) + max(self.prices.unmap_ps, default=0)

    def execute(self, plan: StepPlan) -> StepTime:
        """The step, the actions before it, and what of the background work outlasts the step. For one step alone."""
        if plan.steps != 1:
            raise ValueError("a stretch is priced by `steady`")
        step_ps = self.model.step_ps(load_of(plan))
        stall_ps = self.prices.total_ps(plan.actions) if plan.actions else 0
        if plan.ahead:
            stall_ps += max(0, self.prices.total_ps(plan.ahead) - step_ps)
        return StepTime(step_ps + stall_ps, stall_ps)

    def hidden_maps(self, plan: StepPlan) -> int:
        """How many page-groups, in every tensor, can be mapped beside the step and unmapped elsewhere, for no time."""
        return self.model.step_ps(load_of(plan)) // self._moved_ps if self._moved_ps else FOREVER

    def stretch(self, plan: StepPlan, run: SteadyRun) -> StepTime:
        """The first steps of a run, as many as the plan has. What is mapped beside them makes none of them longer."""
        return run.take(plan.steps)

    def survivors(self, group: Group) -> tuple[int, ...]:
        """As the group's survival model draws: from its seed, the request and the position, and nothing else."""
        first = group.first
        return survivors(first.decoding, first.seq_id, first.known_tokens)

    def steady(self, plan: StepPlan) -> SteadyRun:
        """The run of decode steps that begins with a steady plan."""
        return self.model.steady(load_of(plan))


def load_of(plan: StepPlan) -> StepLoad:
    """What a plan has the device do. Query i of a chunk that starts at s attends to s + i + 1 keys."""
    decodes = len(plan.decodes)
    context = sum([r.computed for r in plan.decodes]) + decodes
    if not plan.prefills:
        return StepLoad(decodes, decodes, context)
    pairs = sum(c.tokens * c.start + c.tokens * (c.tokens + 1) // 2 for c in plan.prefills)
    return StepLoad(plan.num_tokens, decodes, context, pairs)

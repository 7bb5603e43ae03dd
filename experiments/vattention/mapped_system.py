"""What the experiments on vAttention's mapping share: their one system, and driver calls at another price."""

from dataclasses import replace

from kvarena.allocators.options import unit_option
from kvarena.errors import UserError
from kvarena.harness.run.run import P, Run
from kvarena.harness.run.systems import System


def the_system(run: Run[object]) -> System:
    """The run's only system. Raises UserError where there are others, or it maps nothing."""
    if len(run.systems) != 1 or unit_option(run.systems[0].allocator) != "page_group":
        raise UserError(
            f"systems={[s.name for s in run.systems]}: {run.experiment} takes one system with allocator vattention, "
            "and changes how it maps"
        )
    return run.systems[0]


def with_driver_calls(run: Run[P], times: int) -> Run[P]:
    """The run on a modelled device whose mapping calls take so many times as long."""
    map_us, unmap_us = ({k: times * us for k, us in each.items()} for each in (run.device.map_us, run.device.unmap_us))
    return replace(run, device=replace(run.device, map_us=map_us, unmap_us=unmap_us))


def on_gpus(run: Run[P], tp: int, max_tokens: int) -> Run[P]:
    """The run with its model on `tp` GPUs, and a context of at least `max_tokens`: the paper stretched it by RoPE."""
    return replace(run, model=replace(run.model, tp=tp, max_tokens=max(run.model.max_tokens, max_tokens)))

"""Requests at once by size of page-group (vAttention Fig 15): one trace, more of it than the server can take."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from kvarena.errors import UserError
from kvarena.experiments.averages import window
from kvarena.experiments.mapping import on_gpus
from kvarena.experiments.replay import Replayer, context_of, workload_of
from kvarena.harness.kv_pool import kv_pool_bytes
from kvarena.harness.model import load_preset
from kvarena.harness.record import Frames
from kvarena.harness.run import Run
from kvarena.harness.systems import System

MEMORY_UTILIZATION = 0.9  # of the paper's runs


class Variant(NamedTuple):
    """A system with one unit of allocation, and what the figure calls that."""

    label: str  # as published: 64KB ... 2MB
    system: System


def variants(run: Run) -> Iterator[Variant]:
    """Every system with each of its units. Raises UserError for one without any."""
    params = run.params
    for system in run.systems:
        if hasattr(system.allocator, "page_group"):
            for sliced, sizes in ((False, params.page_groups), (True, params.sliced_page_groups)):
                for size in sizes:
                    allocator = replace(system.allocator, page_group=size, tensor_slicing=sliced, max_rows=1024)
                    label = f"{size} sliced" if sliced else size
                    published = None if sliced else label
                    yield Variant(label, replace(system, allocator=allocator, variant=label, published=published))
        elif hasattr(system.allocator, "block_size"):
            for size in params.block_sizes:
                label = f"blocks of {size}"
                allocator = replace(system.allocator, block_size=size)
                yield Variant(label, replace(system, allocator=allocator, variant=label, published=None))
        else:
            raise UserError(f"systems: {system.name} has no unit to change; those with page-groups or blocks have")


def models(run: Run) -> Iterator[Run]:
    """The run with each model of the figure, in the pool that its GPUs leave; measured, as it is."""
    if run.clock == "measured":
        yield run
        return
    for name, gpus in run.params.gpus.items():
        served = replace(run, model=load_preset(name, tp=gpus))
        pool = kv_pool_bytes(run.device, served.model, context_of(served), MEMORY_UTILIZATION) // gpus
        yield replace(served, params=replace(run.params, pool_bytes=pool))


def measure(run: Run, variant: Variant, seed: int) -> Frames:
    """The largest batch of one replay, and the mean one while someone waits."""
    replayer = Replayer(on_gpus(run, run.model.tp, context_of(run)))
    steps = replayer.serve(variant.system, workload_of(run, seed=seed)).steps
    waiting = window(steps, None)
    mean = (waiting.requests * waiting.steps).sum() / waiting.steps.sum()
    point = {"model": run.model.name, "unit": variant.label, "seed": seed, "max_batch": int(steps.requests.max()),
             "mean_batch": float(mean), "preempted": int(steps.preempted.sum())}  # fmt: skip
    return {"points": pd.DataFrame([point])}

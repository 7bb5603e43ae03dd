"""One batch of `allocation_overlap`, decoded in memory that is mapped in three ways, step by step in turn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

import pandas as pd

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.memory.store import DriverCalls
from kvarena.allocators.options import option
from kvarena.allocators.policy import Admission, Policy, Sequence
from kvarena.allocators.vattention.page_groups import RowGeometry, checked_page_group, row_geometries
from kvarena.allocators.vmm.fragments import scattered_pages_held
from kvarena.experiments.vattention.decode_cell import check_steps, resident
from kvarena.experiments.vattention.mapped_system import the_system
from kvarena.harness.engine.fixed_batch import FixedBatch
from kvarena.harness.model.contract import Model
from kvarena.harness.record.record import Frames
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System


@dataclass
class Params:
    """`params.*` of conf/experiment/allocation_overlap.yaml; null there means: by the profile."""

    iterations: int = 0  # decode-only iterations that count
    max_batch: int = 0
    max_tokens: int = 0  # longest sequence
    spike_ms: float = 0.0  # above the median: a spike
    # measured clock
    prompt_tokens: int = 0  # of the shortest sequence
    cohorts: int = 1  # the sequences of a cohort are equally long, and grow in the same iteration
    stagger: int = 0  # tokens from one cohort to the next
    warmup_steps: int = 0
    check_steps: int = 0  # steps whose logits must agree before anything is timed
    rounds: int = 1  # batches, each in fresh memory: the samples of every interval
    gpus: dict[str, int] = field(default_factory=dict)  # modelled clock: model -> GPUs

    @property
    def steps(self) -> int:
        """Tokens that every sequence of a measured batch decodes."""
        return self.warmup_steps + self.check_steps + self.iterations

    def prompts(self) -> list[int]:
        """Lengths of a measured batch."""
        return [self.prompt_tokens + self.stagger * (i % self.cohorts) for i in range(self.max_batch)]


class Way(StrEnum):
    """When page-groups are mapped."""

    SYNC = "sync"  # in front of the iteration that needs them
    OVERLAPPED = "overlapped"  # beside the iteration before it
    PREMAPPED = "premapped"  # at the start
    IN_TURN = "sync, GPUs in turn"  # as sync, the driver serving one GPU at a time; modelled clock only


# Fields of the allocator that `system_in` sets.
CHANGED = ("overlap", "eager_allocation", "eager_groups", "reclaim_threshold", "watermark")
MEASURED = (Way.SYNC, Way.OVERLAPPED, Way.PREMAPPED)


def system_in(way: Way, system: System) -> System:
    """The system with one switch changed. Nothing else maps: no slot is kept ready, no row gives back."""
    plain = replace(
        system.allocator, overlap=way is Way.OVERLAPPED, eager_allocation=False, reclaim_threshold=0, watermark=0
    )
    return replace(system, name=way.value, variant=f"{system.shown_allocator}-{way}", allocator=plain)


def measure(run: Run[Params], model: Model, number: int) -> Frames:
    """Latency of every step, a row for each way and iteration; the driver's calls meanwhile, a row for each way."""
    params = run.params
    prompts = params.prompts()
    pool_bytes = len(prompts) * _row_bytes(run, model)
    batches: dict[str, FixedBatch] = {}
    try:
        with scattered_pages_held(run.device.kind):
            turn = number % len(MEASURED)  # which pages a pool gets depends on those made before it
            for way in MEASURED[turn:] + MEASURED[:turn]:
                system = system_in(way, the_system(run))
                batches[way] = resident(run, system, model, prompts, pool_bytes, _prime(way, params, len(prompts)))
        check_steps(run, batches)
        for batch in batches.values():
            for _ in range(params.warmup_steps):
                batch.step()
        before = {way: batch.store.driver_calls() for way, batch in batches.items()}
        steps = pd.DataFrame(_in_turn(batches, params.iterations))
        calls = [_calls(way, before[way], batch) for way, batch in batches.items()]
        return {"iterations": steps, "driver_calls": pd.DataFrame(calls)}
    finally:
        for batch in batches.values():
            batch.close()


def _row_bytes(run: Run[Params], model: Model) -> int:
    """Bytes of one row mapped to its end, in all tensors."""
    rows = geometries(the_system(run), model.config.kv_layout())
    return sum(g.num_tensors * g.row_bytes(run.params.max_tokens) for g in rows)


def geometries(system: System, kv_layout: KVLayout) -> tuple[RowGeometry, ...]:
    """How a system's rows lie in page-groups, by layer group."""
    size, sliced = (option(system.allocator, name) for name in ("page_group", "tensor_slicing"))
    return row_geometries(kv_layout, checked_page_group(size), sliced)


def _prime(way: Way, params: Params, rows: int) -> Callable[[Policy], None]:
    """Premapped rows are inherited (section 6.1.2) from sequences that were as long as any can become."""

    def inherit(policy: Policy) -> None:
        if way is Way.PREMAPPED:
            for i in range(rows):
                policy.admit(Admission([Sequence(i, params.max_tokens, 0)], params.max_tokens))
            for i in range(rows):
                policy.release(i)

    return inherit


def _in_turn(batches: dict[str, FixedBatch], iterations: int) -> Iterator[dict[str, object]]:
    """One step of each; every iteration begins with another, so that none always follows the same neighbour."""
    ways = list(batches)
    for iteration in range(iterations):
        turn = iteration % len(ways)
        for way in ways[turn:] + ways[:turn]:
            record = batches[way].step()
            yield {
                "way": way, "iteration": iteration, "latency_ms": 1e3 * record.step_s, "batch": record.batch,
                "stall_ms": 1e3 * record.actions_s, "actions": record.actions, "ahead": record.ahead,
            }  # fmt: skip


def _calls(way: str, before: DriverCalls, batch: FixedBatch) -> dict[str, object]:
    batch.policy.check_integrity()
    after = batch.store.driver_calls()
    return {"way": way, **{key: value - getattr(before, key) for key, value in after._asdict().items()}}

"""One cell of `decode_throughput`: every system at one batch size, checked against each other, then interleaved."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import pandas as pd
import torch

from kvarena.allocators.policy import Policy
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vmm.fragments import scattered_pages_held
from kvarena.errors import UserError
from kvarena.experiments.kit.same_logits import check_same_logits
from kvarena.experiments.vattention.decode_modelled import Params, without_watermark
from kvarena.harness.engine.fixed_batch import FixedBatch, StepRecord
from kvarena.harness.engine.serving import Serving
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.measured.memory import available_bytes
from kvarena.harness.model.contract import Model
from kvarena.harness.record.record import Frames
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System


class Decoded(Protocol):
    """Params that say how far a batch decodes."""

    max_tokens: int  # longest sequence
    check_steps: int  # whose logits must agree

    @property
    def steps(self) -> int:
        """Tokens that every sequence decodes."""


def measure_cell(run: Run[Params], model: Model, read: StreamingRead, prompts: list[int]) -> Frames:
    """All systems at one batch size, interleaved."""
    params = run.params
    pool_bytes = _pool_bytes(run, len(prompts))
    batches: dict[str, FixedBatch] = {}
    try:
        with scattered_pages_held(run.device.kind):  # else the first pools are made of scattered pages, and read slower
            for system in run.systems:
                batches[system.name] = resident(run, system, model, prompts, pool_bytes)
        check_steps(run, batches)
        for _ in range(params.warmup_steps):
            for batch in batches.values():
                batch.step()
        before = read.gb_per_s()
        steps = pd.DataFrame(_rounds(params, batches))
        after = read.gb_per_s()
        accounts = [_account(name, b, before, after) for name, b in batches.items()]
        return {"steps": steps, "requests": _requests(batches), "batches": pd.DataFrame(accounts)}
    finally:
        for batch in batches.values():
            batch.close()


def _pool_bytes(run: Run[Params], batch: int) -> int:
    """Bytes of every allocator's pool. Raises UserError where the systems together exceed the machine."""
    params = run.params
    pool = params.pool_bytes or batch * run.model.shard().kv_layout().resident_bytes(params.max_tokens)
    needed, left = pool * len(run.systems), available_bytes(torch.device(run.device.kind))
    if needed > left:
        fits = batch * left // needed
        raise UserError(
            f"params.batch_sizes: a batch of {batch} cannot fit: {len(run.systems)} systems x {format_bytes(pool)} = "
            f"{format_bytes(needed)}, and {format_bytes(left)} is free. About {fits} sequences of params.max_tokens="
            f"{params.max_tokens} fit, or fewer systems"
        )
    return pool


def resident(
    run: Run[Decoded],
    system: System,
    model: Model,
    prompts: list[int],
    pool_bytes: int,
    prime: Callable[[Policy], None] = lambda policy: None,
) -> FixedBatch:
    """A system with its batch in memory; `prime` sees the empty policy first."""
    with ExitStack() as stack:
        context = run.params.max_tokens
        bare = without_watermark(system)
        serving = stack.enter_context(Serving(run, bare, pool_bytes=pool_bytes, context=context, model=model))
        prime(serving.policy)
        batch = FixedBatch(serving, prompts, run.params.steps)
        stack.pop_all()  # it is the batch's to close
    return batch


def check_steps(run: Run[Decoded], batches: dict[str, FixedBatch]) -> None:
    """Steps whose logits must agree between the systems, before anything is timed. Raises RuntimeError."""
    for _ in range(run.params.check_steps):
        logits: dict[str, torch.Tensor] = {}
        for name, batch in batches.items():
            batch.step()
            assert batch.executor.logits is not None
            logits[name] = batch.executor.logits
        check_same_logits(logits, run.model.dtype, "a step")


def _rounds(params: Params, batches: dict[str, FixedBatch]) -> Iterator[dict[str, object]]:
    """Rounds of steps; each begins with another system, so that none always follows the same neighbour."""
    names = list(batches)
    for number in range(params.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            for step in range(params.steps_per_round):
                record = _told(batches[name], batches[name].step())
                leaves = batches[name].leaves()
                yield {"system": name, "round": number, "step": step, **record._asdict(), **leaves}


def _told(batch: FixedBatch, record: StepRecord) -> StepRecord:
    """A step without the parts that only a full queue of the device tells: launched one by one, short kernels wait."""
    return record if batch.executor.queue_full else record._replace(append_s=math.nan, attention_s=math.nan)


def _account(name: str, batch: FixedBatch, before: float, after: float) -> dict[str, object]:
    """What holds for the whole cell: physical bytes, driver calls, the machine's limit before and after."""
    batch.policy.check_integrity()
    return {
        "system": name,
        "batch": len(batch.requests),
        "pool_bytes": batch.policy.pool_bytes,
        "read_gb_per_s_before": before,
        "read_gb_per_s_after": after,
        **batch.store.physical()._asdict(),
        **{f"driver_{key}": value for key, value in batch.store.driver_calls()._asdict().items()},
    }


def _requests(batches: dict[str, FixedBatch]) -> pd.DataFrame:
    return pd.DataFrame(
        {"system": name, "batch": len(b.requests), "seq_id": r.seq_id, "prompt_tokens": r.prompt_tokens,
         "generated_tokens": r.generated, "num_preemptions": r.num_preemptions}
        for name, b in batches.items()
        for r in b.requests
    )  # fmt: skip

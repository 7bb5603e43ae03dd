"""One row per iteration, or per stretch of identical ones, in a flat array of 64-bit integers."""

from array import array

import numpy as np
import pandas as pd

from kvarena.allocators.usage import Usage
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan, StepTime

COLUMNS = (
    "start_ps",
    "steps",  # identical decode steps that the row stands for
    "duration_ps",  # of all of them, on the clock: scheduling included where it takes time
    "slope_ps",  # by how much each takes longer than the one before
    "stall_ps",  # of the duration, waiting for the allocator
    "requests",  # in the batch, in every one of the steps: a group counts once, a row that only pads not at all
    "decodes",  # sequences, in every one of the steps, without rows that only pad
    "output_tokens",  # yielded by each of the steps
    "prefills",  # sequences that are fed; of a group that gets its prompt, one
    "prefill_tokens",
    "reused_tokens",  # not fed by those admitted in this step: a prefix held them, or a prefix cache
    "preempted",
    "swapped_out",
    "swapped_in",
    "actions",  # of the allocator, before the step
    "ahead",  # beside it; of all the steps together
    "waiting",  # requests that stay in line, or swapped out, when the first of the steps is scheduled
    "shared_bytes",  # what sequences hold together, counted beyond the first time; summed over the steps
    *Usage._fields,  # bytes, summed over the steps; taken after scheduling, before the forward pass
)


def _num_requests(decodes: list[Request], prefills: list[PrefillChunk]) -> int:
    """A group decodes with all its members; of a group that is recomputed any of them may be fed."""
    led = sum([r.group is None or r.leads for r in decodes])
    return led + len({chunk.request.request_id for chunk in prefills}) if prefills else led


class StepLog:
    """The rows of one replay."""

    def __init__(self) -> None:
        self._values = array("q")

    def __len__(self) -> int:
        return len(self._values) // len(COLUMNS)

    def add(
        self,
        start_ps: int,
        end_ps: int,
        plan: StepPlan,
        time: StepTime,
        waiting: int,
        usage: Usage,
        shared_bytes: int = 0,
    ) -> None:
        """Record a plan that ran from start to end, before its tokens are booked.

        `usage` and `shared_bytes` are sums over its steps.
        """
        decodes, prefills = plan.decoding, plan.prefills
        self._values.extend(
            (
                start_ps,
                plan.steps,
                end_ps - start_ps,
                time.slope_ps,
                time.stall_ps,
                _num_requests(decodes, prefills),
                len(decodes),
                len(decodes) + sum([len(chunk.readers) for chunk in prefills if chunk.is_last]),
                len(prefills),
                sum([chunk.tokens for chunk in prefills]) if prefills else 0,
                plan.reused_tokens,
                len(plan.preempted),
                len(plan.swapped_out),
                len(plan.swapped_in),
                len(plan.actions),
                len(plan.ahead),
                waiting,
                shared_bytes,
                *usage,
            )
        )

    def to_frame(self) -> pd.DataFrame:
        """The rows as int64 columns."""
        values = np.frombuffer(self._values, dtype=np.int64) if self._values else np.empty(0, np.int64)
        return pd.DataFrame(values.reshape(-1, len(COLUMNS)).copy(), columns=list(COLUMNS))

"""One row per iteration, or per stretch of identical ones, in a flat array of 64-bit integers."""

from array import array

import numpy as np
import pandas as pd

from kvarena.allocators.usage import Usage
from kvarena.harness.step import StepPlan, StepTime

COLUMNS = (
    "start_ps",
    "steps",  # identical decode steps that the row stands for
    "duration_ps",  # of all of them, on the clock: scheduling included where it takes time
    "slope_ps",  # by how much each takes longer than the one before
    "stall_ps",  # of the duration, waiting for the allocator
    "decodes",  # sequences, in every one of the steps
    "prefills",  # sequences
    "prefill_tokens",
    "reused_tokens",  # not fed by those admitted in this step: a prefix held them, or a prefix cache
    "preempted",
    "swapped_out",
    "swapped_in",
    "actions",  # of the allocator, before the step
    "ahead",  # beside it; of all the steps together
    "waiting",  # requests in line when the row starts
    "shared_bytes",  # what sequences hold together, counted beyond the first time; summed over the steps
    *Usage._fields,  # bytes, summed over the steps; taken after scheduling, before the forward pass
)


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
        """Record a plan that ran from start to end. `usage` and `shared_bytes` are sums over its steps."""
        prefills = plan.prefills
        self._values.extend(
            (
                start_ps,
                plan.steps,
                end_ps - start_ps,
                time.slope_ps,
                time.stall_ps,
                len(plan.decodes),
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

"""One row per request, as a frame; a request of several sequences has a row for each, of one `request_id`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kvarena.harness.requests.request import Request

COUNTS = (
    "seq_id", "request_id", "prompt_tokens", "output_tokens", "arrival_ps", "num_preemptions", "reused_tokens",
    "stall_ps",
)  # fmt: skip
TIMES = ("scheduled_ps", "first_token_ps", "finish_ps")  # missing where it never came to that


def request_frame(requests: Sequence[Request]) -> pd.DataFrame:
    """Columns of COUNTS as int64, of TIMES as Int64, `state` and `refusal` as text."""
    columns: dict[str, object] = {}
    for name in COUNTS:
        columns[name] = np.array([getattr(r, name) for r in requests], dtype=np.int64)
    for name in TIMES:
        values = [getattr(r, name) for r in requests]
        missing = np.array([value is None for value in values], dtype=bool)
        present = np.array([value or 0 for value in values], dtype=np.int64)
        columns[name] = pd.arrays.IntegerArray(present, missing)
    columns["state"] = [str(r.state) for r in requests]
    columns["refusal"] = [r.refusal for r in requests]
    return pd.DataFrame(columns)

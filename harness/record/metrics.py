"""Latencies, rates and goodput of one replay (docs/metrics.md defines the symbols).

All latencies count from the scheduled arrival a. n output tokens, first at t1, last at f; scheduled first at s:

    normalized   (f - a) / n            mean: PagedAttention's metric, in s/token
    e2el         f - a
    ttft         t1 - a
    tpot         (f - t1) / (n - 1)     where n > 1
    itl          every gap between two tokens of one request, pooled over requests
    queueing     s - a
    stall        time in which its steps waited for the allocator

Refused requests are counted, and enter nothing else but the rate asked. A request of several sequences enters
latencies once for each sequence, and counts and rates of requests once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvarena.errors import UserError

PS = 10**12  # picoseconds of a second
LATENCIES = ("normalized_s", "e2el_s", "ttft_s", "tpot_s", "queueing_s", "stall_s")


def latencies(requests: pd.DataFrame) -> pd.DataFrame:
    """The columns LATENCIES, a row for each finished request, from a frame of `requests/request_log.py`."""
    done = requests[requests.finish_ps.notna()]
    e2el_s = (done.finish_ps - done.arrival_ps).astype(float) / PS
    decode_s = (done.finish_ps - done.first_token_ps).astype(float) / PS
    gaps = done.output_tokens - 1
    return pd.DataFrame(
        {
            "normalized_s": e2el_s / done.output_tokens,
            "e2el_s": e2el_s,
            "ttft_s": (done.first_token_ps - done.arrival_ps).astype(float) / PS,
            "tpot_s": (decode_s / gaps.where(gaps > 0)).astype(float),
            "queueing_s": (done.scheduled_ps - done.arrival_ps).astype(float) / PS,
            "stall_s": done.stall_ps / PS,
        }
    )


def makespan_s(requests: pd.DataFrame) -> float:
    """From the first arrival to the last finish of those that finished; NaN where nobody did."""
    done = requests[requests.finish_ps.notna()]
    return float(done.finish_ps.max() - done.arrival_ps.min()) / PS if len(done) else float("nan")


def inter_token_quantiles(
    steps: pd.DataFrame, resumed_gaps_ps: Sequence[int], quantiles: Sequence[float]
) -> NDArray[np.float64]:
    """Quantiles of ITL in seconds, exactly, from the step log: [len(quantiles)].

    Whoever decodes in a step had its last token at the end of the step before, so its gap is the step's duration (rows
    that only pad a batch are not among the log's decodes);
    `resumed_gaps_ps` holds the others, in which a preemption lies. A quantile is the smallest gap that is not
    exceeded by that share of all gaps.
    """
    decoding = steps[steps.decodes > steps.swapped_in]
    first_ps = (
        decoding.duration_ps - decoding.slope_ps * (decoding.steps * (decoding.steps - 1) // 2)
    ) // decoding.steps
    row = np.repeat(np.arange(len(decoding)), decoding.steps)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(decoding.steps) - decoding.steps, decoding.steps)
    durations = first_ps.to_numpy()[row] + nth * decoding.slope_ps.to_numpy()[row]
    counts = (decoding.decodes - decoding.swapped_in).to_numpy()[row]
    gaps = np.concatenate([durations, np.asarray(resumed_gaps_ps, dtype=np.int64)])
    weights = np.concatenate([counts, np.ones(len(resumed_gaps_ps), dtype=np.int64)])
    if not len(gaps):
        return np.full(len(quantiles), np.nan)
    order = np.argsort(gaps)
    reached = np.cumsum(weights[order])
    at = np.searchsorted(reached, np.asarray(quantiles) * reached[-1])
    return np.asarray(gaps[order][np.minimum(at, len(gaps) - 1)] / PS, dtype=np.float64)


def goodput(requests: pd.DataFrame, limits: Mapping[str, float]) -> float:
    """Sequences per second of makespan that keep every limit, e.g. {"ttft_s": 2, "tpot_s": 0.2}.

    A request of one output token has no TPOT, and keeps any limit on it. Raises UserError for an unknown name.
    """
    table = latencies(requests)
    good = pd.Series(True, index=table.index)
    for name, limit in limits.items():
        if name not in LATENCIES:
            raise UserError(f"goodput: no latency is called {name!r}. There are: {', '.join(LATENCIES)}")
        good &= ~(table[name] > limit)
    return float(good.sum()) / makespan_s(requests)


def once_each(requests: pd.DataFrame) -> pd.DataFrame:
    """One row for each request: the first of its sequences."""
    return requests.drop_duplicates("request_id") if "request_id" in requests else requests


def reused_share(steps: pd.DataFrame) -> float:
    """Of the tokens that admitted requests began with, the share that was not fed: a prefix held them, or a cache."""
    reused, fed = int(steps.reused_tokens.sum()), int(steps.prefill_tokens.sum())
    return reused / (reused + fed) if reused + fed else float("nan")


def summarize(requests: pd.DataFrame, steps: pd.DataFrame, resumed_gaps_ps: Sequence[int]) -> dict[str, float]:
    """Every scalar metric of one replay, by name; the unit ends the name where it has one."""
    table = latencies(requests)
    span_s = makespan_s(requests)
    arrived = once_each(requests)
    done = requests[requests.finish_ps.notna()]
    served = once_each(done)
    metrics = {"normalized_latency_s": float(table.normalized_s.mean())}
    for name in ("e2el", "ttft", "tpot", "queueing", "stall"):
        column = table[f"{name}_s"].dropna()
        metrics[f"{name}_mean_s"] = float(column.mean())
        metrics[f"{name}_p50_s"], metrics[f"{name}_p99_s"] = map(float, column.quantile([0.5, 0.99]))
    itl_p50_s, itl_p99_s = inter_token_quantiles(steps, resumed_gaps_ps, [0.5, 0.99])
    return metrics | {
        "itl_p50_s": float(itl_p50_s),
        "itl_p99_s": float(itl_p99_s),
        "finished": len(served),
        "refused": int((arrived.refusal != "").sum()),
        "preemptions": int(arrived.num_preemptions.sum()),
        "rate_asked_per_s": rate_asked(arrived),
        "rate_reached_per_s": len(served) / span_s,
        "output_tokens_per_s": float(done.output_tokens.sum()) / span_s,
        "total_tokens_per_s": float(served.prompt_tokens.sum() + done.output_tokens.sum()) / span_s,
        "makespan_s": span_s,
    }


def rate_asked(requests: pd.DataFrame) -> float:
    """Arrivals per second, from the first to the last; NaN for fewer than two, or all at once."""
    span_ps = requests.arrival_ps.max() - requests.arrival_ps.min()
    return float((len(requests) - 1) / span_ps * PS) if len(requests) > 1 and span_ps else float("nan")

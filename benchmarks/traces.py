"""What a million requests cost: drawn from a table, given times. CPU seconds, ratios to plain numpy.

    ./run.sh benchmark traces

Plain numpy draws as many (prompt, output, gap) without the joint distribution, the bounds, or the promise that a seed
gives the same trace on every platform. The artifact draws 100 numbers per second of the trace, whatever the rate.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.arrival import ArrivalConfig, draw_arrivals

REQUESTS = 1_000_000
ROUNDS = 7


def plain_numpy() -> None:
    """The yardstick."""
    rng = np.random.default_rng(0)
    rng.integers(1, 2048, (REQUESTS, 2))
    np.cumsum(rng.exponential(0.5, REQUESTS))


def table() -> None:
    """Requests of the ShareGPT table, within the recipe's bounds."""
    load_trace(TraceConfig(table="sharegpt", filter="paper_artifact", num_requests=REQUESTS))


def arrivals(process: str) -> None:
    """A million arrivals at 2 requests/s."""
    draw_arrivals(ArrivalConfig(process=process, rate=2.0, burstiness=0.5, duration_s=REQUESTS / 2), None, 0)


def seconds(function: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    cases: dict[str, Callable[[], None]] = {
        "plain numpy": plain_numpy,
        "length table": table,
        "poisson": lambda: arrivals("poisson"),
        "gamma": lambda: arrivals("gamma"),
        "artifact": lambda: arrivals("artifact"),
    }
    rounds = [{name: seconds(case) for name, case in cases.items()} for _ in range(ROUNDS)]  # interleaved
    base = median(each["plain numpy"] for each in rounds)
    for name in cases:
        typical = median(each[name] for each in rounds)
        print(f"{name:<14}{typical:8.3f} s{typical / base:8.1f} x plain numpy")


if __name__ == "__main__":
    main()

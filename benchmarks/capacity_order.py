"""Do the systems of PagedAttention's Fig 12a come in its order under every seed: FT < Max < Pow2 < Oracle < vLLM?

    python -P benchmarks/capacity_order.py [--seeds 5]

Each seed draws one trace of OPT-13B ShareGPT for all five systems; the capacity is the highest rate whose mean
normalized latency stays within 0.5 s/token, by bisection.
"""

import argparse

import pandas as pd

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.harness.record.capacity import capacity, paired_ratio
from kvarena.harness.record.metrics import latencies

SYSTEMS = {
    "fastertransformer": 0.2,
    "orca-max": 0.5,
    "orca-pow2": 0.8,
    "orca-oracle": 1.1,
    "paged": 1.9,
}  # guesses, 1/s
LIMIT_S = 0.5  # s/token


def capacities(seed: int, duration_s: float) -> dict[str, float]:
    """Requests/s that each system sustains on one trace."""
    run = compose_run("experiment=waterfall", "clock=modelled", f"systems=[{','.join(SYSTEMS)}]")
    replayer = Replayer(run)
    rates = {}
    for system in run.systems:

        def latency_at(rate: float) -> float:
            workload = workload_of(run, seed=seed, rate=rate, duration_s=duration_s)
            return float(latencies(replayer.serve(system, workload).requests).normalized_s.mean())  # noqa: B023

        rates[system.name] = capacity(latency_at, LIMIT_S, SYSTEMS[system.name], tolerance=0.02, stride=1.3).rate
    return rates


def main() -> None:
    """Print a row per seed, and the ratio that the paper gives as 1.75."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--duration-s", type=float, default=1200.0)
    arguments = parser.parse_args()
    rates = pd.DataFrame([capacities(seed, arguments.duration_s) for seed in range(arguments.seeds)])
    print(rates.assign(in_order=[list(row) == sorted(row) for row in rates.to_numpy()]).to_string(float_format="%.3f"))
    ratio = paired_ratio(rates, "paged", "orca-oracle")
    print(f"vLLM / Orca(Oracle): {ratio:.2f}, published 1.75 (modelled)")


if __name__ == "__main__":
    main()

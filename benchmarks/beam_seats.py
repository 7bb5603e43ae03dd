"""Beams' children in the rows of the dead: what vAttention's `reseat` saves over releasing and forking.

    python benchmarks/beam_seats.py [--rounds 3] [--rate 6]

Modelled replays of beams of width 4 (PagedAttention Fig 14e), the two ways in turns: CPU time of the thread, best of
the rounds, and what the decisions cost on the modelled device.
"""

import argparse
import time

from kvarena.allocators.policy import Policy
from kvarena.allocators.vattention.groups import RowGroups
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, Served, workload_of
from kvarena.experiments.pagedattention.parallel_sampling import with_rows
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

BEAMS = DecodingConfig("beam", n=4)
SYSTEMS = "vattention-2mb,vattention-sliced-2mb,vattention-64kb"


def replay(run: Run[object], system: System, rate: float) -> tuple[float, Served]:
    """CPU seconds of a replay, and what happened."""
    workload = workload_of(run, rate=rate)
    start = time.thread_time()
    served = Replayer(run).serve(system, workload, BEAMS)
    return time.thread_time() - start, served


def compare(run: Run[object], system: System, rate: float, rounds: int) -> None:
    """Print one system's ratios."""
    own = RowGroups.reseat
    one_s, two_s = [], []
    for _ in range(rounds):
        seconds, one = replay(run, system, rate)
        one_s.append(seconds)
        RowGroups.reseat = Policy.reseat  # type: ignore[method-assign]
        try:
            seconds, two = replay(run, system, rate)
        finally:
            RowGroups.reseat = own  # type: ignore[method-assign]
        two_s.append(seconds)
    stalls = [frames.steps.stall_ps.sum() / frames.steps.steps.sum() / 1e9 for frames in (one, two)]
    calls = [frames.steps.actions.sum() / frames.steps.steps.sum() for frames in (one, two)]
    print(
        f"{system.name:22} CPU time {min(two_s) / min(one_s):.2f} times; a step's actions {calls[1]:.1f} -> "
        f"{calls[0]:.1f}, its stall {stalls[1]:.2f} -> {stalls[0]:.2f} ms"
    )


def main() -> None:
    """Print the ratios of every system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=6.0)
    arguments = parser.parse_args()
    run = compose_run("experiment=beam_search", f"systems=[{SYSTEMS}]", "arrival.duration_s=60")
    for system in with_rows(run.systems, run.params.max_rows):
        compare(run, system, arguments.rate, arguments.rounds)


if __name__ == "__main__":
    main()

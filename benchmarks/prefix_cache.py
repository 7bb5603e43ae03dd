"""What a prefix cache costs a modelled replay: its CPU time with the cache over without, and clock events.

Chats of the embedded table, whose histories nobody cuts, on the devices and at the rate of experiment=prefix_cache. The
cases take turns. A replay with the cache has less to feed, and names, finds and gives up units instead.
"""

import argparse
import time

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, Served, workload_of
from kvarena.experiments.ours.cached_service import WAYS, with_cache
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.systems import System


def timed(replayer: Replayer, system: System, workload: Workload) -> tuple[float, Served]:
    """CPU seconds of one replay, and what happened."""
    start = time.thread_time()
    served = replayer.serve(system, workload)
    return time.thread_time() - start, served


def main() -> None:
    """Print a line for each system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    run = compose_run("experiment=prefix_cache", f"trace.num_requests={arguments.requests}")
    replayer, workload = Replayer(run), workload_of(run)
    for system in run.systems:
        ratios, events = [], {}
        for _ in range(arguments.rounds):
            seconds = {}
            for on in WAYS:
                seconds[on], served = timed(replayer, with_cache(system, len(workload), on), workload)
                events[on] = len(served.steps)
            ratios.append(seconds[True] / seconds[False])
        print(f"{system.name}: {median_interval(ratios):.2f} times the CPU time, "
              f"{events[True]} clock events for {events[False]}")  # fmt: skip


if __name__ == "__main__":
    main()

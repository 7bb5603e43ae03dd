"""How fast a modelled replay runs: requests per second of one core, everything recorded; and what jumping gains.

Workloads come from the embedded length tables. CPU time of the thread, best of a few rounds with the cases taking
turns: other work on the machine only ever adds to it. `--grid` replays as many requests as PagedAttention's whole
Fig 12: six panels, five systems, its durations, on every core.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, requests_of, workload_of
from kvarena.experiments.ours.cached_service import with_cache
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.serving import Serving
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.run import Run

MODELLED = ("experiment=memory_waste", "clock=modelled", "params.window_s=null")
CASES = {
    "azure_conv, 4/s, 10,000 requests, Llama-3-8B on an A100-80GB, budget 16,384": (
        20_000,
        16_384,
        ("engine=lean", "device=a100-80gb", "model=llama-3-8b", "trace=azure_conv", "trace.num_requests=10000",
         "arrival=poisson", "arrival.rate=4"),
    ),
    "sharegpt, 1.9/s, 3600 s, OPT-13B on 984 blocks": (
        10_000,
        None,
        ("arrival=poisson", "arrival.rate=1.9", "arrival.duration_s=3600"),
    ),
}  # fmt: skip
# Fig 12, panel by panel: model, device, trace, seconds, rows of FasterTransformer, and about the rate at which each
# system's latency takes off. Every system is replayed at LOADS times that rate.
GRID = {
    "a": ("opt-13b", "a100-40gb", "sharegpt", 3600, 6, (0.23, 0.6, 0.83, 1.1, 1.93)),
    "b": ("opt-66b", "a100-40gb", "sharegpt", 3600, 2, (0.1, 0.21, 0.27, 0.4, 0.94)),
    "c": ("opt-175b", "a100-80gb", "sharegpt", 900, 26, (0.12, 0.96, 1.28, 1.62, 2.4)),
    "d": ("opt-13b", "a100-40gb", "alpaca", 3600, 14, (1.7, 3.8, 16, 21, 27)),
    "e": ("opt-66b", "a100-40gb", "alpaca", 3600, 8, (1.1, 1.2, 7, 12, 20)),
    "f": ("opt-175b", "a100-80gb", "alpaca", 900, 80, (0.8, 5.8, 15, 17, 20)),
}
SYSTEMS = ("fastertransformer", "orca-max", "orca-pow2", "orca-oracle", "paged")
LOADS = (0.5, 0.75, 0.9, 1.0, 1.05)
VATTENTION = ("vattention-2mb", "vattention-64kb", "vattention-sliced-2mb")


def case_of(budget: int | None, overrides: tuple[str, ...], name: str = "paged") -> tuple[Run[object], Workload]:
    """A run of one system alone, and its workload."""
    run = compose_run(*MODELLED, f"systems=[{name}]", *overrides)
    [system] = run.systems
    if budget is not None:
        run = replace(run, systems=(replace(system, scheduler=replace(system.scheduler, token_budget=budget)),))
    return run, workload_of(run)


def replay_s(run: Run[object], workload: Workload, *, jump: bool) -> float:
    """CPU seconds of one replay with its record, from the requests to the frames."""
    [system] = run.systems
    serving = Serving(run, system)
    engine = Engine(serving.scheduler, serving.executor, jump=jump)
    start = time.thread_time()
    done = engine.run(requests_of(workload))
    _ = request_frame(done.requests), done.steps.to_frame()
    return time.thread_time() - start


@cache
def grid_run(panel: str, index: int) -> Run[object]:
    """The run of one curve of the grid, at any rate."""
    model, device, trace, seconds, rows, _ = GRID[panel]
    name = SYSTEMS[index]
    padded = ["allocator=fastertransformer", f"allocator.batch_size={rows}"]
    return compose_run(
        *MODELLED, f"model={model}", f"device={device}", f"trace={trace}", f"systems=[{name}]", "arrival=poisson",
        "arrival.rate=1", f"arrival.duration_s={seconds}", *(padded if name == "fastertransformer" else []),
    )  # fmt: skip


def point(case: tuple[str, int, float]) -> tuple[int, float]:
    """Replay one point of the grid. Returns its requests, and CPU seconds with the workload's own."""
    panel, index, load = case
    start = time.thread_time()
    run = grid_run(panel, index)
    workload = workload_of(run, rate=GRID[panel][5][index] * load)
    Replayer(run).serve(run.systems[0], workload)
    return len(workload), time.thread_time() - start


def speeds(rounds: int) -> None:
    """Print requests per second of each case, and what walking token by token costs in comparison."""
    cases = {name: (target, *case_of(budget, overrides)) for name, (target, budget, overrides) in CASES.items()}
    jumping: dict[str, list[float]] = {name: [] for name in cases}
    walking: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (_, run, workload) in cases.items():
            jumping[name].append(replay_s(run, workload, jump=True))
            walking[name].append(replay_s(run, workload, jump=False))
    for name, (target, _, workload) in cases.items():
        rate = len(workload) / min(jumping[name])
        gain = min(walking[name]) / min(jumping[name])
        print(f"{name}: {rate:,.0f} requests/s (target {target:,}; ratio {rate / target:.2f})")
        print(f"    token by token: {gain:.1f} times the time")
    print(f"memory at its highest: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB (target 400 MB)")


def vattention(rounds: int) -> None:
    """Print how much longer vAttention's replays take than the paged one, where the pool binds."""
    _, budget, overrides = list(CASES.values())[-1]
    cases = {name: case_of(budget, overrides, name) for name in ("paged", *VATTENTION)}
    times = {name: min(replay_s(*case, jump=True) for _ in range(rounds)) for name, case in cases.items()}
    for name in VATTENTION:
        print(f"{name}: {times[name] / times['paged']:.1f} times the time of paged, on the last of these")


def cached(rounds: int) -> None:
    """Print what a prefix cache costs: less is fed, and units are named, found and given up instead.

    Chats of the embedded table, whose histories nobody cuts, as experiment=prefix_cache has them.
    """
    run = compose_run("experiment=prefix_cache", "trace.num_requests=1000")
    workload = workload_of(run)
    for system in run.systems:
        runs = [replace(run, systems=(with_cache(system, len(workload), on),)) for on in (True, False)]
        times = [[replay_s(each, workload, jump=True) for each in runs] for _ in range(rounds)]
        on_s, off_s = map(min, zip(*times, strict=True))
        print(f"{system.name}: {on_s / off_s:.2f} times the time with a prefix cache, on chats")


def grid(workers: int) -> None:
    """Print how long the grid takes on `workers` cores, drawing the workloads included."""
    points = [(panel, index, load) for panel in GRID for index in range(len(SYSTEMS)) for load in LOADS]
    points.sort(key=lambda p: -GRID[p[0]][3] * GRID[p[0]][5][p[1]] * p[2])  # longest first, so that the end is even
    start = time.perf_counter()
    with ProcessPoolExecutor(workers) as pool:
        done = list(pool.map(point, points))
    wall_s = time.perf_counter() - start
    requests, cpu_s = sum(n for n, _ in done), sum(s for _, s in done)
    print(
        f"Fig 12 grid: {len(points)} points, {requests:,} requests in {wall_s:.0f} s on {workers} cores (target 60 s)"
    )
    print(f"    CPU time {cpu_s:.0f} s, {requests / cpu_s:,.0f} requests/s of one core")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grid", action="store_true", help="replay the whole of Fig 12 instead")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.grid:
        grid(arguments.workers)
    else:
        speeds(arguments.rounds)
        vattention(arguments.rounds)
        cached(arguments.rounds)


if __name__ == "__main__":
    main()

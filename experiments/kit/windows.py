"""The window over which an experiment averages, where a trace ends before it begins."""

from kvarena.harness.accounts.told import tell_once
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.run import Run


def window_of(
    run: Run[object], workload: Workload, bounds_s: list[float] | None, key: str = "params.window_s"
) -> list[float] | None:
    """The window of `key`; None, the steps that leave someone waiting, where the last request arrives before it begins
    and nobody asked for it. That is said."""
    if bounds_s is None or key in run.given or workload.arrival_s[-1] >= bounds_s[0]:
        return bounds_s
    tell_once(
        f"{key}={bounds_s} begins after the last request has arrived ({workload.arrival_s[-1]:g} s): averages are over "
        "the steps that leave someone waiting, or all where none does"
    )
    return None

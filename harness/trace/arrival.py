"""When requests arrive: processes by name, times in integer picoseconds, never rescaled to reach a rate exactly."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.seeded import Floats, Ints, Stream

PS = 10**12  # picoseconds of a second
MOST_REQUESTS = 10**8
LONGEST_S = 9e6  # 104 days: what a signed 64-bit clock in picoseconds holds


@dataclass
class ArrivalConfig:
    """What a user may say of arrivals; the files of conf/arrival/ are instances."""

    process: str = "poisson"  # poisson, gamma, constant, artifact, sarathi; recorded and all_at_once draw nothing
    rate: float | None = None  # requests/s
    burstiness: float = 1.0  # gamma only: shape of the gaps; 1 is Poisson, below 1 is burstier
    duration_s: float | None = None  # arrivals before this time; null: one for each request of the trace
    seed: int | None = None  # null: the trace's
    quantum_s: float = 0.01  # artifact only: arrivals fall on multiples of this

    def __str__(self) -> str:
        """As a panel's title has it: `4 req/s for 900 s`, or the process where it has no rate."""
        what = self.process.replace("_", " ") if self.rate is None else f"{self.rate:g} req/s"
        return what if self.duration_s is None else f"{what} for {self.duration_s:g} s"


DRAWN = ("poisson", "gamma", "constant", "artifact", "sarathi")
UNDRAWN = ("recorded", "all_at_once")


def check(config: ArrivalConfig) -> None:
    """Refuse what makes no sense. Raises UserError."""
    if config.process not in DRAWN + UNDRAWN:
        raise UserError(f"arrival.process={config.process}: no such process. There are: {', '.join(DRAWN + UNDRAWN)}")
    for key in ("rate", "burstiness", "duration_s", "quantum_s"):
        value = getattr(config, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"arrival.{key}={value}: must be a number above 0")
    if config.duration_s is not None and config.duration_s > LONGEST_S:
        raise UserError(f"arrival.duration_s={config.duration_s}: must be at most {LONGEST_S:.0f}")
    if config.rate is not None and config.rate > PS:
        raise UserError(f"arrival.rate={config.rate:g}: must be at most {PS:.0e}, for the clock counts picoseconds")
    if config.process in DRAWN and config.rate is None:
        raise UserError(f"arrival={config.process} needs arrival.rate, in requests/s")
    if config.process == "all_at_once" and config.duration_s is not None:
        raise UserError("arrival=all_at_once takes no arrival.duration_s: everything arrives at 0")
    if config.process in UNDRAWN and config.rate is not None:
        raise UserError(f"arrival={config.process} takes no arrival.rate: nothing is rescaled")


def draw_arrivals(config: ArrivalConfig, num_requests: int | None, seed: int) -> Ints:
    """Times of arrival, ascending, in picoseconds: [N] int64.

    Ends before `config.duration_s` and after `num_requests`, whichever comes first. Raises UserError where neither is
    given, and for whatever else of `config` makes no sense.
    """
    check(config)
    if num_requests is None and config.duration_s is None:
        raise UserError("how many arrivals? Set arrival.duration_s or trace.num_requests")
    assert config.rate is not None
    most = min(config.rate * (config.duration_s or math.inf), num_requests or math.inf)
    if most > MOST_REQUESTS:
        raise UserError(f"{config} are {most:.3g} arrivals; a replay has at most {MOST_REQUESTS:.0e}")
    if config.process == "artifact":
        times = _artifact(config, seed)
    elif config.process == "constant":
        times = _constant(config.rate, num_requests, config.duration_s)
    else:
        times = _renewal(_gaps(config, seed), config.rate, num_requests, config.duration_s)
    if config.duration_s is not None:
        times = times[times < round(config.duration_s * PS)]
    first: Ints = times[:num_requests]
    return first


def _constant(rate: float, num_requests: int | None, duration_s: float | None) -> Ints:
    """k / rate, from 0."""
    bounds = [num_requests, None if duration_s is None else math.ceil(duration_s * rate) + 1]
    count = min(bound for bound in bounds if bound is not None)
    _check_span(count / rate)
    times: Ints = np.rint(np.arange(count) * (PS / rate)).astype(np.int64)
    return times


def _gaps(config: ArrivalConfig, seed: int) -> Callable[[int], Floats]:
    """A function that draws the next n gaps, in seconds."""
    rate, shape, stream = config.rate, config.burstiness, Stream(seed, "arrivals")
    assert rate is not None
    if config.process == "sarathi":
        return _sarathi_gaps(rate, random.Random(seed))
    if config.process == "poisson" or shape == 1:
        return lambda count: stream.exponentials(count) / rate

    def gamma(count: int) -> Floats:
        # One uniform per gap through the inverse CDF: no rejection that a last bit could tip. The library's last
        # bits differ between platforms, hence whole microseconds.
        from scipy.special import gammaincinv

        gaps = gammaincinv(shape, stream.uniforms(count)) / (rate * shape)
        return np.asarray(np.rint(gaps * 1e6) / 1e6, np.float64)

    return gamma


def _sarathi_gaps(rate: float, generator: random.Random) -> Callable[[int], Floats]:
    """Sarathi-Serve's generator, which vAttention's evaluation uses: exponential gaps, none above 3 / rate.

    So 5 % more requests arrive than were asked for. That it draws from Python's generator is our reading.
    """
    return lambda count: np.array([min(3.0, -math.log(1.0 - generator.random())) / rate for _ in range(count)])


def _renewal(gaps: Callable[[int], Floats], rate: float, num_requests: int | None, duration_s: float | None) -> Ints:
    """Running sums of gaps, the first arrival after the first gap."""
    times: list[Ints] = []
    drawn, last = 0, 0
    expected = num_requests if duration_s is None else math.ceil(rate * duration_s)
    assert expected is not None
    while (num_requests is None or drawn < num_requests) and (duration_s is None or last < duration_s * PS):
        chunk = gaps(max(expected - drawn, expected // 64, 16))
        _check_span(last / PS + float(chunk.sum()))
        times.append(last + np.cumsum(np.rint(chunk * PS).astype(np.int64)))
        drawn, last = drawn + len(chunk), int(times[-1][-1])
    return np.concatenate(times)


def _artifact(config: ArrivalConfig, seed: int) -> Ints:
    """PagedAttention's SOSP'23 artifact: a Poisson number of arrivals at the start of every 10 ms.

    It seeds numpy's global state; RandomState(seed) is that state, and its draws are frozen for good.
    """
    assert config.rate is not None
    if not 0 <= seed < 2**32:
        raise UserError(f"arrival.seed={seed}: the artifact's generator takes 0 to 2**32 - 1")
    if config.duration_s is None:
        raise UserError("arrival=artifact needs arrival.duration_s (the paper: 3600, and 900 for OPT-175B)")
    quanta = int(config.duration_s * (1 / config.quantum_s))
    counts = np.random.RandomState(seed).poisson(config.rate * config.quantum_s, size=quanta)
    return np.repeat(np.arange(quanta) * round(config.quantum_s * PS), counts)


def _check_span(span_s: float) -> None:
    if span_s > LONGEST_S:
        raise UserError(f"the arrivals span {span_s:.3g} s; the clock holds {LONGEST_S:.0f} s. Raise arrival.rate")

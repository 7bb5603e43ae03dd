import hashlib
import math
import random
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import expon, gamma, kstest

from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.trace.arrival import PS, ArrivalConfig, check, draw_arrivals

N = 50_000


def arrivals(count=N, seed=0, **fields):
    return draw_arrivals(ArrivalConfig(**fields), count, seed)


def digest(times):
    return hashlib.sha256(times.astype("<i8").tobytes()).hexdigest()[:16]


def gaps_s(times):
    return np.diff(times, prepend=0) / PS


def test_poisson_gaps_are_exponential():
    times = arrivals(process="poisson", rate=4.0)
    assert times.dtype == np.int64
    assert kstest(gaps_s(times), expon(scale=1 / 4).cdf).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gamma_gaps_have_their_shape(burstiness):
    gaps = gaps_s(arrivals(process="gamma", rate=4.0, burstiness=burstiness))
    cdf = gamma(burstiness, scale=1 / (4 * burstiness)).cdf
    at = np.arange(1, 4_000_000, 997) / 1e6 + 5e-7  # between the whole microseconds that gaps are rounded to
    below = np.searchsorted(np.sort(gaps), at) / N
    assert np.abs(below - cdf(at)).max() < 1.63 / N**0.5  # Kolmogorov's 1 % point
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_gamma_of_shape_1_is_poisson():
    poisson, shaped = arrivals(process="poisson", rate=2.0), arrivals(process="gamma", rate=2.0, burstiness=1.0)
    assert poisson.tolist() == shaped.tolist()


def test_constant_has_no_drift():
    times = arrivals(process="constant", rate=3.0)
    assert times[:3].tolist() == [0, PS // 3, 2 * PS // 3 + 1]
    assert times[30_000] == 10_000 * PS


def test_sarathi_cuts_long_gaps():
    """Python's generator, no gap above 3 / rate; 5 % more requests arrive than were asked for."""
    generator = random.Random(42)
    expected = [min(3.0, -math.log(1 - generator.random())) / 0.25 for _ in range(N)]
    gaps = gaps_s(arrivals(seed=42, process="sarathi", rate=0.25))
    assert gaps == pytest.approx(expected, abs=1e-7)
    assert gaps.max() == pytest.approx(12)
    assert 1 / gaps.mean() == pytest.approx(0.25 / (1 - math.exp(-3)), rel=0.02)


def test_gaps_are_not_rescaled_to_the_rate():
    """A sample of exponential gaps misses its rate by about 1 / sqrt(n), each seed differently."""
    rates = [100 * PS / arrivals(100, seed, process="poisson", rate=5.0)[-1] for seed in range(40)]
    assert np.std(rates) == pytest.approx(5 / 10, rel=0.3)


def test_same_seed_same_arrivals_on_every_platform():
    assert digest(arrivals(2000, process="poisson", rate=1.9)) == "9df7c5ee97d6cdb5"
    assert digest(arrivals(2000, process="gamma", rate=1.9, burstiness=0.5)) == "ea5eb97342a67e6c"
    assert digest(arrivals(2000, process="artifact", rate=1.9, duration_s=3600)) == "2d5f907d91e7683b"


def test_rates_share_their_randomness():
    """Twice the rate is the same process, twice as fast: curves over rates are paired."""
    slow, fast = arrivals(1000, process="poisson", rate=1.0), arrivals(1000, process="poisson", rate=2.0)
    assert np.abs(slow - 2 * fast).max() <= 2000  # rounded once per gap


@settings(max_examples=60, deadline=None)
@given(
    process=st.sampled_from(["poisson", "gamma", "constant", "artifact", "sarathi"]),
    rate=st.floats(0.001, 300),
    duration_s=st.floats(0.02, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_arrivals_ascend_and_end_with_the_duration(process, rate, duration_s, seed):
    times = arrivals(None, seed, process=process, rate=rate, duration_s=duration_s)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < duration_s * PS)).all()
    if process != "artifact":  # which draws by quantum, not by gap: the longer run begins with the shorter
        longer = arrivals(None, seed, process=process, rate=rate, duration_s=2 * duration_s)
        assert longer[: len(times)].tolist() == times.tolist()
        assert (longer[len(times) :] >= duration_s * PS - 1).all()


def test_whichever_bound_comes_first():
    assert len(arrivals(10, process="poisson", rate=5.0, duration_s=1000)) == 10
    assert len(arrivals(10**6, process="poisson", rate=5.0, duration_s=100)) == pytest.approx(500, abs=100)


@pytest.mark.parametrize(("rate", "duration", "seed"), [(2.0, 600, 0), (0.3, 3600, 1), (150.0, 20, 5)])
def test_artifact_draws_as_the_artifact(rate, duration, seed):
    """Its generator seeds numpy's global state and draws one Poisson number per 10 ms."""
    np.random.seed(seed)
    expected = [quantum * PS // 100 for quantum in range(duration * 100) for _ in range(np.random.poisson(rate * 0.01))]
    ours = arrivals(None, seed, process="artifact", rate=rate, duration_s=duration)
    assert ours.tolist() == expected


@pytest.mark.parametrize("name", names("arrival"))
def test_every_arrival_of_conf_is_valid(name):
    config = typed(ArrivalConfig, load("arrival", name), "arrival")
    assert config.process == name
    assert set(load("arrival", name)) == {field.name for field in fields(ArrivalConfig)}  # else Hydra refuses overrides
    check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "arrival.rate=0.0"),
        ({"rate": -1.0}, "arrival.rate=-1.0: must be"),
        ({"rate": float("nan")}, "arrival.rate=nan: must be"),
        ({"rate": float("inf")}, "arrival.rate=inf: must be"),
        ({}, "arrival=poisson needs arrival.rate"),
        ({"process": "gamma", "rate": 1.0, "burstiness": 0.0}, "arrival.burstiness=0.0: must be"),
        ({"rate": 1.0, "duration_s": 0.0}, "arrival.duration_s=0.0: must be"),
        ({"rate": 1.0, "duration_s": 1e7}, "arrival.duration_s=10000000.0: must be at most"),
        ({"process": "uniform", "rate": 1.0}, "no such process. There are: poisson, gamma"),
        ({"process": "recorded", "rate": 1.0}, "takes no arrival.rate: nothing is rescaled"),
        ({"process": "all_at_once", "duration_s": 1.0}, "takes no arrival.duration_s"),
        ({"process": "artifact", "rate": 1.0}, "arrival=artifact needs arrival.duration_s"),
        ({"rate": 1e-6}, "the arrivals span .* Raise arrival.rate"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(UserError, match=message):
        arrivals(100, **fields)


@pytest.mark.parametrize(
    ("seed", "fields", "said"),
    [
        (0, {}, "arrival.duration_s or trace.num_requests"),
        (2**32, {"process": "artifact", "duration_s": 1.0}, "arrival.seed=4294967296"),
    ],
)
def test_no_bound_and_no_small_seed(seed, fields, said):
    with pytest.raises(UserError, match=said):
        arrivals(None, seed, rate=1.0, **fields)

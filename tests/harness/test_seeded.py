import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.errors import UserError
from kvarena.harness.seeded import Stream, exact_log


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_exact_log_is_within_two_units_in_the_last_place(x):
    log = math.log(x)
    assert abs(exact_log(np.array([x]))[0] - log) <= 2 * math.ulp(max(abs(log), 2.0**-2))


def test_streams_of_one_seed_are_independent():
    first, second = Stream(1, "lengths").words(10_000, 63), Stream(1, "arrivals").words(10_000, 63)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert not np.isin(first, second).any()


def test_words_continue_where_they_ended():
    stream = Stream(3, "x")
    assert np.concatenate([stream.words(5, 20), stream.words(7, 20)]).tolist() == Stream(3, "x").words(12, 20).tolist()


@given(st.integers(1, 2**31), st.integers(0, 2**63))
def test_below_stays_below(limit, seed):
    drawn = Stream(seed, "x").below(50, limit)
    assert (drawn >= 0).all()
    assert (drawn < limit).all()


def test_permutation_is_one():
    assert sorted(Stream(0, "x").permutation(1000)) == list(range(1000))


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="seed=-1"):
        Stream(-1, "x")

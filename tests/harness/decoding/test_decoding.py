"""How tokens are chosen: samples, beams, and who lives on where no model gives scores."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.errors import UserError
from kvarena.harness.decoding.beam import first_generation, log_softmax, next_generation
from kvarena.harness.decoding.mix import decodings
from kvarena.harness.decoding.sampling import sample
from kvarena.harness.decoding.survival import seated, sources, survivors
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.request_list import check_width, make_requests
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace.arrival import ArrivalConfig
from kvarena.harness.trace.config import TraceConfig

RNG = np.random.default_rng(1)
PARALLEL = DecodingConfig("parallel", 4)
PARENTS = st.integers(1, 8).flatmap(lambda k: st.lists(st.integers(0, k - 1), min_size=k, max_size=k))


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    scores = RNG.normal(size=5).astype(np.float32)
    decoding = DecodingConfig("parallel", 1, temperature=temperature)
    drawn = Counter(sample(scores, decoding, 0, 0, position) for position in range(4000))
    expected = torch.softmax(torch.from_numpy(scores) / temperature, 0).numpy() * 4000
    observed = np.array([drawn[token] for token in range(5)])
    assert ((observed - expected) ** 2 / expected).sum() < 18.5, "chi-squared of 4 degrees: 18.5 is passed once in 1000"


def test_a_sample_depends_on_seed_request_member_and_position():
    scores = np.zeros(1000, np.float32)
    base = [PARALLEL, 3, 1, 17]
    others = [DecodingConfig("parallel", 4, seed=1)], [PARALLEL, 4], [PARALLEL, 3, 2], [PARALLEL, 3, 1, 18]
    assert sample(scores, *base) == sample(scores, *base)
    assert len({sample(scores, *base), *(sample(scores, *(other + base[len(other) :])) for other in others)}) == 5


def test_scores_that_differ_in_rounding_sample_alike():
    scores = RNG.normal(size=(200, 300)).astype(np.float32)
    nudged = np.nextafter(scores, np.inf)
    drawn = [[sample(row, PARALLEL, i, 0, 0) for i, row in enumerate(rows)] for rows in (scores, nudged)]
    assert drawn[0] == drawn[1]


# ---- beam search ---------------------------------------------------------------------------------------------------


def test_log_softmax_is_torchs():
    scores = RNG.normal(size=(3, 50)).astype(np.float32) * 30
    expected = torch.log_softmax(torch.from_numpy(scores).double(), -1).numpy()
    np.testing.assert_allclose(log_softmax(scores), expected, rtol=1e-12)


def ranked_slowly(scores, totals):
    """All continuations as (total, parent, token), the best first; of equal ones the lower parent, then token."""
    log_probs = log_softmax(scores)
    every = [(totals[b] + log_probs[b, t], b, t) for b, t in product(range(len(scores)), range(scores.shape[1]))]
    return sorted(every, key=lambda c: (-c[0], c[1], c[2]))


@settings(deadline=None)
@given(
    width=st.integers(1, 5),
    vocabulary=st.integers(5, 12),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([2, 5, 10**6]),  # few levels: many ties
)
def test_the_k_best_continuations_live_on(width, vocabulary, seed, levels):
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels, (width, vocabulary)) / levels).astype(np.float32)
    totals = -rng.integers(0, levels, width) / levels
    generation = next_generation(scores, totals)
    best = ranked_slowly(scores, totals)[:width]
    seats = zip(generation.totals, generation.sources, generation.tokens, strict=True)
    assert Counter(seats) == Counter(best)
    for parent in {b for _, b, _ in best}:
        assert generation.sources[parent] == parent, "a beam that lives on keeps its seat"
        assert generation.tokens[parent] == next(t for _, b, t in best if b == parent), "with its best continuation"


def test_the_first_generation_has_the_likeliest_tokens():
    scores = np.array([0.5, 3, 3, -1, 2], np.float32)
    generation = first_generation(scores, 4)
    assert (generation.sources, generation.tokens) == ((0, 0, 0, 0), [1, 2, 4, 0])
    np.testing.assert_allclose(generation.totals, log_softmax(scores[None])[0][[1, 2, 4, 0]])


def test_a_beam_of_one_is_greedy():
    scores = RNG.normal(size=(1, 40)).astype(np.float32)
    assert next_generation(scores, np.array([-3.0])).tokens == [int(scores.argmax())]


# ---- survival under the modelled clock -----------------------------------------------------------------------------


@settings(deadline=None)
@given(PARENTS)
def test_seats_are_filled_and_kept(parents):
    children = seated(parents)
    assert sorted(children) == list(range(len(parents)))
    came_from = sources(parents)
    assert Counter(came_from) == Counter(parents)
    assert all(came_from[parent] == parent for parent in parents)


def test_figure_9_of_pagedattention():
    """Beams 1 and 2 have two children each, 0 and 3 none: their seats go to the second children."""
    assert sources([1, 2, 1, 2]) == (1, 1, 2, 2)


def test_the_band_of_survival():
    everyone = DecodingConfig("beam", 4, survival="all")
    one = DecodingConfig("beam", 4, survival="one")
    assert survivors(everyone, 5, 9) == (0, 1, 2, 3)
    drawn = {survivors(one, request, position) for request in range(20) for position in range(20)}
    assert drawn == {(seat,) * 4 for seat in range(4)}


@pytest.mark.parametrize("k", [2, 4, 6])
def test_neutral_survival_favours_nobody(k):
    """Of k beams, k (1 - (1 - 1/k)^k) have a child on average: k draws with replacement."""
    decoding = DecodingConfig("beam", k, seed=3)
    drawn = [survivors(decoding, request, position) for request in range(60) for position in range(60)]
    assert np.mean([len(set(each)) for each in drawn]) == pytest.approx(k * (1 - (1 - 1 / k) ** k), rel=0.02)
    children = Counter(parent for each in drawn for parent in each)
    assert all(children[seat] / len(drawn) == pytest.approx(1, abs=0.08) for seat in range(k))
    assert drawn == [survivors(decoding, request, position) for request in range(60) for position in range(60)]
    assert drawn != [
        survivors(DecodingConfig("beam", k, seed=4), request, position)
        for request in range(60)
        for position in range(60)
    ]


# ---- what a user may say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nucleus"}, "no such method. There are: greedy, parallel, beam"),
        ({"name": "parallel", "n": 0}, "decoding.n=0: the number of samples is at least 1"),
        ({"name": "beam", "n": 0}, "decoding.n=0: a beam's width is at least 1"),
        ({"n": 2}, "decoding.n=2: greedy decoding yields one sequence"),
        ({"name": "parallel", "temperature": 0}, "decoding.temperature=0"),
        ({"name": "parallel", "seed": -1}, "decoding.seed=-1"),
        ({"name": "beam", "survival": "fittest"}, "decoding.survival=fittest.*neutral, one, all"),
    ],
)
def test_what_decoding_refuses(options, message):
    with pytest.raises(UserError, match=message):
        DecodingConfig(**options)


def test_a_beam_wider_than_the_vocabulary_is_refused():
    check_width([DecodingConfig("beam", 10), DecodingConfig("parallel", 11)], vocab_size=10)
    with pytest.raises(UserError, match=r"decoding.n=11.* 10"):
        check_width([GREEDY, DecodingConfig("beam", 11)], vocab_size=10)


def test_a_mix_draws_methods_by_their_shares():
    mix = {"greedy": 0.5, "n4": 0.2, "n3-beam": 0.3}
    drawn = decodings(DecodingConfig("parallel", 2, temperature=0.7, seed=5), mix, 4000, seed=0)
    counts = Counter((each.name, each.n) for each in drawn)
    assert counts.keys() == {("greedy", 1), ("parallel", 4), ("beam", 3)}
    assert counts["parallel", 4] == pytest.approx(800, abs=90)
    assert {(each.temperature, each.seed) for each in drawn if each.n > 1} == {(0.7, 5)}
    assert drawn == decodings(DecodingConfig("parallel", 2, temperature=0.7, seed=5), mix, 4000, seed=0)
    assert decodings(GREEDY, None, 3, seed=0) == [GREEDY] * 3


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"n2": 0.5, "n4": 0.4}, "shares are 0 or more, and sum to 1"),
        ({"n2": -0.5, "n4": 1.5}, "shares are 0 or more, and sum to 1"),
        ({"2": 1.0}, "trace.mix: 2 names no method of decoding"),
        ({"n0-beam": 1.0}, "decoding.n=0"),
    ],
)
def test_what_a_mix_refuses(mix, message):
    with pytest.raises(UserError, match=message):
        decodings(GREEDY, mix, 10, seed=0)


def test_requests_of_a_mix_are_groups_side_by_side():
    workload = make_workload(
        TraceConfig(prompt_tokens=5, output_tokens=2, num_requests=3), ArrivalConfig("all_at_once"), 100
    )
    requests = make_requests(workload, [PARALLEL, GREEDY, DecodingConfig("beam", 2)])
    assert [r.seq_id for r in requests] == list(range(7))
    assert [r.request_id for r in requests] == [0, 0, 0, 0, 4, 5, 5]
    assert [r.leads for r in requests] == [True, False, False, False, True, True, False]
    assert requests[4].group is None
    assert requests[5].group.seq_ids == [5, 6]

"""Traces drawn from embedded tables: like the data, within bounds, the same everywhere."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import lengths
from scipy.stats import ks_2samp, spearmanr

from kvarena.errors import UserError
from kvarena.harness.config import load, names
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace import length_table as module
from kvarena.harness.trace.length_table import length_table, sample, table_names
from kvarena.harness.trace.recipes import Recipe, recipe
from kvarena.harness.trace.tabulate_lengths import tabulate

DRAWS = 400_000
SIDES = ["prompt_tokens", "output_tokens"]


def digest(trace):
    lengths = np.stack([trace.prompt_tokens, trace.output_tokens]).astype("<i8")
    return hashlib.sha256(lengths.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("table", "prompt", "output", "spearman"),
    [  # means and rank correlations of the data behind each table
        ("sharegpt", 161.31, 337.99, 0.21),
        ("sharegpt_v3", 110.58, 328.26, 0.15),
        ("alpaca", 19.31, 58.45, -0.22),
        ("azure_conv", 1155, 211, 0.07),
        ("azure_code", 2048, 27.88, -0.02),
        ("arxiv_summarization", 2588, 291, -0.11),
        ("wmt16_1shot", 108.5, 36.3, 0.96),
        ("wmt16_5shot", 369.5, 36.3, 0.96),
    ],
)
def test_moments(table, prompt, output, spearman):
    trace = load_trace(TraceConfig(table=table, num_requests=DRAWS))
    assert trace.prompt_tokens.mean() == pytest.approx(prompt, rel=0.006)
    assert trace.output_tokens.mean() == pytest.approx(output, rel=0.006)
    assert spearmanr(trace.prompt_tokens, trace.output_tokens)[0] == pytest.approx(spearman, abs=0.01)


def differs_by_noise(drawn, data):
    """Whether both marginals are the data's, up to what the bins of a table and a sample's own noise allow."""
    limit = 0.005 + 1.36 / DRAWS**0.5  # the latter is of a distribution function, 95 %
    return all(ks_2samp(getattr(drawn, side), data[side]).statistic <= limit for side in SIDES)


@pytest.mark.parametrize(
    ("table", "file", "longest"),
    [
        ("sharegpt", "sharegpt_lengths.csv", 2048),
        ("alpaca", "alpaca_lengths.csv", None),
        ("azure_code", "azure_code.csv", None),
    ],
)
def test_the_tables_in_the_project_are_the_datas(shared, table, file, longest):
    data = pd.read_csv(shared(f"data/{file}"))
    data = data[data[SIDES].min(axis=1) > 0]
    if longest is not None:
        data = data[data[SIDES].sum(axis=1) <= longest]
    assert differs_by_noise(sample(length_table(table), DRAWS, 0, recipe("none", longest)), data)


@pytest.mark.parametrize("table", ["sharegpt", "azure_code"])
def test_a_table_is_its_data(table, tmp_path, monkeypatch):
    """Data of our own: what `tabulate` makes of it is drawn like it."""
    data = lengths(table, 20_000)
    text = tabulate(*(data[side].to_numpy() for side in SIDES))
    counts = np.array([line.split(",")[1:] for line in text.split() if line.startswith("w")], int)
    assert counts.shape == (32, 32)
    for axis in (0, 1):
        assert abs(counts.sum(axis) - len(data) / 32).max() <= 1, "bins of equal probability"
    (tmp_path / f"own_{table}.csv").write_text(text)
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    drawn = sample(length_table(f"own_{table}"), DRAWS, 0, recipe("none", None))
    assert differs_by_noise(drawn, data)
    ours, theirs = (
        spearmanr(*(each[side] for side in SIDES))[0]
        for each in (pd.DataFrame({side: getattr(drawn, side) for side in SIDES}), data)
    )
    assert ours == pytest.approx(theirs, abs=0.02)


def test_same_seed_same_trace_on_every_platform():
    """The digests are of this arithmetic, not of this machine: they may change only with the rule of drawing."""
    assert (
        digest(load_trace(TraceConfig(table="sharegpt", num_requests=5000, filter="paper_artifact")))
        == "5ea91981ac6c504a"
    )
    assert digest(load_trace(TraceConfig(table="azure_conv", num_requests=5000, seed=7))) == "e23281efa22f6652"
    config = TraceConfig(prompt_tokens=1024, output_tokens=128, range_ratio=0.5, num_requests=5000)
    assert digest(load_trace(config)) == "86d3ff7f46345a69"


def test_a_longer_trace_begins_with_the_shorter():
    """So that runs at several rates share their requests."""
    config = TraceConfig(table="sharegpt", filter="paper_artifact", max_tokens=600)
    short, long = load_trace(config, num_requests=700), load_trace(config, num_requests=5000)
    assert short.prompt_tokens.tolist() == long.prompt_tokens[:700].tolist()
    assert short.output_tokens.tolist() == long.output_tokens[:700].tolist()


def test_another_seed_is_another_trace():
    first, second = (load_trace(TraceConfig(table="alpaca", seed=seed)) for seed in (0, 1))
    assert len(first) == 1000
    assert (first.total_tokens != second.total_tokens).mean() > 0.9


@settings(max_examples=60, deadline=None)
@given(
    table=st.sampled_from(table_names()),
    seed=st.integers(0, 2**40),
    bounds=st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(50, 3000), st.integers(0, 6000)),
)
def test_every_draw_is_within_the_bounds(table, seed, bounds):
    min_prompt, min_output, max_prompt, room = bounds
    rule = Recipe("test", min_prompt, min_output, max_prompt, max_total=min_prompt + min_output + room)
    trace = sample(length_table(table), 200, seed, rule)
    assert rule.keeps(trace.prompt_tokens, trace.output_tokens).all()
    assert 0 <= trace.provenance["cut"] <= 200


def test_what_is_cut_is_reported(caplog):
    trace = load_trace(TraceConfig(table="azure_conv", num_requests=2000), max_tokens=512)
    assert trace.provenance["cut"] > 1000
    assert f"{trace.provenance['cut']} of 2000 requests were cut to 512 tokens" in caplog.text
    caplog.clear()
    assert load_trace(TraceConfig(table="azure_conv", num_requests=2000), max_tokens=32_768).provenance["cut"] == 0
    assert not caplog.text


def test_the_smaller_of_two_limits_holds():
    config = TraceConfig(table="sharegpt", max_tokens=300)
    assert load_trace(config, max_tokens=2048).total_tokens.max() <= 300
    assert load_trace(config, max_tokens=200).total_tokens.max() <= 200


def test_given_lengths():
    fixed = load_trace(TraceConfig(prompt_tokens=16_384, output_tokens=400, num_requests=3))
    assert fixed.prompt_tokens.tolist() == [16_384] * 3
    assert fixed.output_tokens.tolist() == [400] * 3
    uniform = load_trace(TraceConfig(prompt_tokens=10, output_tokens=3, range_ratio=0.5, num_requests=2000))
    assert np.unique(uniform.prompt_tokens).tolist() == list(range(5, 16))
    assert np.unique(uniform.output_tokens).tolist() == list(range(1, 6))  # floor(1.5) to ceil(4.5)


def test_every_table_has_a_trace():
    assert set(table_names()) <= {load("trace", name).get("table") for name in names("trace")}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TraceConfig(table="nope"), "no such length table. There are: alpaca, "),
        (TraceConfig(), "set trace.path .* trace.table .* or both trace.prompt_tokens"),
        (TraceConfig(table="sharegpt", num_requests=0), r"trace.num_requests=0"),
        (TraceConfig(table="sharegpt", seed=-3), "seed=-3"),
        (TraceConfig(table="sharegpt", max_tokens=1), "trace.max_tokens=1: no room"),
        (TraceConfig(prompt_tokens=0, output_tokens=1), "trace.prompt_tokens=0"),
        (TraceConfig(prompt_tokens=4, output_tokens=1, range_ratio=1.0), "trace.range_ratio=1.0"),
        (TraceConfig(prompt_tokens=600, output_tokens=1, max_tokens=600), "601 tokens, the context holds 600"),
    ],
)
def test_bad_input(config, message):
    with pytest.raises(UserError, match=message):
        load_trace(config)

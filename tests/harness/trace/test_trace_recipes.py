"""The published means come out of the papers' own data, exactly."""

import made_data
import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.record.summary import published_values
from kvarena.harness.trace import TraceConfig, length_histogram, load_trace
from kvarena.harness.trace.recipes import recipe


@pytest.mark.parametrize(
    ("name", "pairs", "prompt", "output"),
    [
        ("none", 84_226, 295.60, 358.02),
        ("paper_figure", 79_731, 161.31, 337.99),  # printed in Fig 11
        ("paper_artifact", 79_725, 161.18, 338.00),
        ("vllm", 74_704, 119.58, 348.41),
    ],
)
def test_sharegpt(shared, name, pairs, prompt, output):
    trace = load_trace(TraceConfig(path=str(shared("data/sharegpt_lengths.csv")), filter=name))
    assert len(trace) == pairs
    assert round(trace.prompt_tokens.mean(), 2) == prompt
    assert round(trace.output_tokens.mean(), 2) == output
    assert trace.provenance["filtered"] == 84_226 - pairs
    assert trace.provenance["malformed"] == 0


def test_alpaca(shared):
    trace = load_trace(TraceConfig(path=str(shared("data/alpaca_lengths.csv"))))
    means = (round(trace.prompt_tokens.mean(), 2), round(trace.output_tokens.mean(), 2))
    assert (len(trace), *means) == (52_002, 19.31, 58.45)  # printed in Fig 11


@pytest.mark.parametrize(("source", "missing"), [("table", 1500), ("file", 2)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_alpaca_histogram_is_fig_11(shared, side, source, missing):
    """Every bar of the figure, to the record of the file; its output panel shows 52,000 of the 52,002 records."""
    config = TraceConfig(table="alpaca", num_requests=52_002)
    trace = load_trace(TraceConfig(path=str(shared("data/alpaca_lengths.csv"))) if source == "file" else config)
    published = published_values("pagedattention", figure="fig11", panel="Alpaca", system=side)
    drawn = published[published.quantity == "histogram_count_vs_bin_left"].set_index("x").value
    lengths = trace.prompt_tokens if side == "input" else trace.output_tokens
    found, _ = np.histogram(lengths, [*drawn.index, np.inf])
    assert found.sum() == len(lengths) == 52_002
    assert np.abs(found - drawn).sum() <= missing


def test_histogram_density_integrates_to_one():
    histogram = length_histogram(np.array([1, 2, 2, 9]), num_bins=4)
    assert histogram.counts.tolist() == [3, 0, 0, 1]
    assert (histogram.density * 2).sum() == pytest.approx(1)


BOUNDS = {  # as the papers and tools state them
    "none": lambda prompt, output: prompt > 0,
    "paper_figure": lambda prompt, output: prompt + output <= 2048,
    "paper_artifact": lambda prompt, output: prompt + output < 2048,
    "vllm": lambda prompt, output: (prompt >= 4) & (output >= 4) & (prompt <= 1024) & (prompt + output <= 2048),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_recipe_keeps_what_its_bounds_say(tmp_path, name):
    path = made_data.write(tmp_path, "sharegpt_lengths.csv")
    stated = pd.read_csv(path)
    kept = stated[BOUNDS[name](stated.prompt_tokens, stated.output_tokens)]
    assert name == "none" or 0 < len(kept) < len(stated)
    trace = load_trace(TraceConfig(path=str(path), filter=name))
    assert trace.prompt_tokens.tolist() == kept.prompt_tokens.tolist()
    assert trace.output_tokens.tolist() == kept.output_tokens.tolist()
    assert (trace.provenance["filtered"], trace.provenance["malformed"]) == (len(stated) - len(kept), 0)


def test_recipes_differ_at_the_edge():
    prompt, output = np.array([1000, 1000, 1024, 1025, 3]), np.array([1047, 1048, 1024, 4, 100])
    assert recipe("paper_figure", None).keeps(prompt, output).tolist() == [True] * 5
    assert recipe("paper_artifact", None).keeps(prompt, output).tolist() == [True, False, False, True, True]
    assert recipe("vllm", None).keeps(prompt, output).tolist() == [True, True, True, False, False]


def test_fits_context_needs_one():
    assert recipe("fits_context", 10).keeps(np.array([5, 5]), np.array([5, 6])).tolist() == [True, False]
    with pytest.raises(UserError, match=r"set trace\.max_tokens"):
        recipe("fits_context", None)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(UserError, match="paper_figure, paper_artifact, vllm"):
        recipe("paper", None)

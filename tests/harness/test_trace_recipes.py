"""The published means come out of the papers' own data, exactly."""

import csv

import numpy as np
import pytest

from kvarena.errors import UserError
from kvarena.harness.paths import PUBLISHED
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


@pytest.mark.parametrize(("side", "missing"), [("input", 0), ("output", 2)])
def test_alpaca_histogram_is_fig_11(shared, side, missing):
    """Every bar of the figure, to the record; its output panel shows 52,000 of the 52,002 records."""
    trace = load_trace(TraceConfig(path=str(shared("data/alpaca_lengths.csv"))))
    ours = length_histogram(trace.prompt_tokens if side == "input" else trace.output_tokens)
    with (PUBLISHED / "pagedattention_figures.csv").open() as file:
        drawn = {
            float(row["x"]): int(float(row["value"]))
            for row in csv.DictReader(file)
            if (row["figure"], row["panel"], row["system"]) == ("fig11", "Alpaca", side)
            and row["quantity"] == "histogram_count_vs_bin_left"
        }
    bins = [int(np.abs(ours.left - left).argmin()) for left in drawn]
    np.testing.assert_allclose(ours.left[bins], list(drawn), atol=0.002)
    assert np.abs(ours.counts[bins] - list(drawn.values())).sum() == missing
    assert ours.counts[bins].sum() == 52_002


def test_histogram_density_integrates_to_one():
    histogram = length_histogram(np.array([1, 2, 2, 9]), num_bins=4)
    assert histogram.counts.tolist() == [3, 0, 0, 1]
    assert (histogram.density * 2).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "pairs", "prompts", "outputs"),
    [
        ("offline", 427, (63_862, 192_786), (17, 5_153)),
        ("online", 512, (22_924, 45_639), (6, 3_250)),
        ("overlap", 300, (1_600, 2_000), (500, 1_000)),
    ],
)
def test_vattention_workloads(shared, name, pairs, prompts, outputs):
    trace = load_trace(TraceConfig(path=str(shared(f"data/vattention_{name}_lengths.csv"))))
    assert len(trace) == pairs
    assert prompts[0] <= trace.prompt_tokens.min() <= trace.prompt_tokens.max() <= prompts[1]
    assert outputs[0] <= trace.output_tokens.min() <= trace.output_tokens.max() <= outputs[1]


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

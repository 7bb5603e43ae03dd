"""The one schema of every summary.csv."""

import pandas as pd
import pytest

from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.statistics import Estimate
from kvarena.harness.record.summary import COLUMNS, beside_published, frame, read_published, row

WHOSE = "experiment paper figure panel system setup label allocator kernel model quantity x"
WHAT = "value unit n ci_low ci_high clock device evidence"
BASE = {
    "experiment": "decode_throughput", "paper": "vattention", "figure": "fig8", "panel": "Yi-6B", "system": "FA2_Paged",
    "setup": "yi-6b, 1 x a100-80gb", "label": "paged/fa2", "allocator": "paged", "kernel": "fa2", "model": "yi-6b",
    "quantity": "decode_throughput_vs_batch", "unit": "tok/s",
    "clock": "modelled", "device": "a100-80gb", "evidence": "calibrated",
}  # fmt: skip


def test_the_columns_are_the_contract() -> None:
    assert [*WHOSE.split(), *WHAT.split()] == COLUMNS


def test_ours_joins_the_published_value() -> None:
    summary = frame([row(800.0, x=32, **BASE)])
    joined = beside_published(summary, read_published(PUBLISHED))
    assert joined["published"].tolist() == [797]


def test_a_row_that_nobody_published_stays() -> None:
    joined = beside_published(frame([row(800.0, x=33, **BASE)]), read_published(PUBLISHED))
    assert (joined.value.tolist(), joined.published.isna().tolist()) == ([800], [True])


def test_a_blank_x_joins_too() -> None:
    base = BASE | {"figure": "fig9", "quantity": "offline_throughput", "unit": "requests/min"}
    joined = beside_published(frame([row(2.7, x=None, **base)]), read_published(PUBLISHED))
    assert joined["published"].tolist() == [2.79]


def test_published_keys_are_unique() -> None:
    published = read_published(PUBLISHED)
    assert not published.duplicated(["paper", "figure", "panel", "system", "quantity", "x"]).any()


def test_x_has_six_significant_digits() -> None:
    assert row(1.0, x=1 / 3, **BASE).x == 0.333333


def test_an_estimate_brings_its_interval() -> None:
    (kept,) = frame([row(Estimate(2.0, 8, 1.0, 3.0), x=1, **BASE)]).to_dict("records")
    assert (kept["value"], kept["n"], kept["ci_low"], kept["ci_high"]) == (2.0, 8, 1.0, 3.0)


def test_two_rows_of_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="share a key"):
        frame([row(1.0, x=1, **BASE), row(2.0, x=1, **BASE)])


@pytest.mark.parametrize(("key", "value"), [("evidence", "guessed"), ("clock", "sundial")])
def test_evidence_and_clock_are_of_a_list(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        row(1.0, x=1, **(BASE | {key: value}))


def test_an_empty_summary_keeps_its_columns() -> None:
    assert list(frame([]).columns) == COLUMNS
    assert isinstance(frame([]), pd.DataFrame)

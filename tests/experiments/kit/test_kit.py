"""What experiments are written with: cells that are read back, quantities of samples, panels of rows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, bars, curves, drawn
from kvarena.experiments.kit.quantities import Quantity, columns, rows
from kvarena.harness.record.record import Frames, Recorder
from kvarena.harness.record.summary import Evidence, Names


def taken(calls: list[str], name: str) -> Frames:
    calls.append(name)
    return {"points": pd.DataFrame({"value": [1.0, 2.0]})}


def test_a_cell_is_measured_once_and_its_rows_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    calls: list[str] = []
    cells = [Cell(name, partial(taken, calls, name), {"system": name}) for name in "ab"]
    for _ in range(2):  # the second time they are read back
        points = run_cells("memory_waste", Recorder("memory_waste", {}), cells)["points"]
        assert points.system.tolist() == ["a", "a", "b", "b"]
        assert points.value.tolist() == [1.0, 2.0] * 2
    assert calls == ["a", "b"]


def named(figure: str | None = None, *, counted: bool = False, **more: object) -> Names:
    base = {"experiment": "e", "paper": "kvarena", "figure": figure or "e", "panel": "here", "system": "paged/numba",
            "setup": "here", "label": "paged/numba", "allocator": "paged", "kernel": "numba", "model": "m", "x": 1.0,
            "clock": "modelled", "device": "d",
            "evidence": Evidence.EXACT if counted else Evidence.PREDICTED}  # fmt: skip
    return Names(**{**base, **more})  # type: ignore[typeddict-item]


def test_a_quantity_is_the_median_of_what_was_taken_and_absent_where_nothing_was() -> None:
    samples = pd.DataFrame({"a": [3.0, 1.0, None], "b": [None] * 3})
    asked = [
        Quantity("twice", "s", lambda s: 2 * s.a, "fig1"),
        Quantity("most", "s", lambda s: float(s.a.max()), counted=True),
    ]
    found = [*rows([*asked, *columns({"a": "s", "b": "s"}, "_vs_x")], samples, named)]
    assert [(r.quantity, r.value, r.n) for r in found] == [("twice", 4.0, 2), ("most", 3.0, 1), ("a_vs_x", 2.0, 2)]
    assert [r.figure for r in found] == ["fig1", "e", "e"]
    assert [r.evidence for r in found] == [Evidence.PREDICTED, Evidence.EXACT, Evidence.PREDICTED]


def summary_of(*more: dict[str, object]) -> pd.DataFrame:
    base = {**named(), "quantity": "q", "value": 1.0, "n": 6, "ci_low": 0.5, "ci_high": 2.0}
    return pd.DataFrame([{**base, **each} for each in more])


@pytest.mark.parametrize("shape", [curves, bars])
def test_every_setup_has_a_panel_of_its_own_and_every_label_a_mark(shape: Callable[..., None]) -> None:
    labels = [{"label": name, "system": name, "allocator": name} for name in ("paged", "static")]
    setups = [{**each, "setup": setup} for setup in ("here", "there") for each in labels]
    figure = drawn(summary_of(*setups, {"quantity": "q:other"}), [Panel(shape, "q", "s")])
    assert [axis.get_title().partition(":")[0] for axis in figure.axes] == ["here", "there"]
    for axis in figure.axes:
        marks = (
            axis.get_legend_handles_labels()[1] if shape is curves else [t.get_text() for t in axis.get_xticklabels()]
        )
        assert marks == ["paged", "static"]

"""The stepped view: one page with a slider, which shows where every unit of the pool is at every step of a replay.

The page carries its data and loads nothing. Between two steps it keeps only what has changed.
"""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from kvarena.experiments.ours.step_frames import Film, Frame

_TEMPLATE = Path(__file__).with_name("stepped_view.html")
_IDLE = -1  # owner of a unit that is mapped and belongs to nobody


def stepped_view(films: Iterable[Film], title: str) -> str:
    """The page, as HTML."""
    data = json.dumps([_film(film) for film in films], separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("__TITLE__", escape(title)).replace("__DATA__", data)


def _film(film: Film) -> dict[str, object]:
    before: dict[int, tuple[int, ...]] = {}
    steps = []
    for frame, row in zip(film.frames, film.steps.to_dict("records"), strict=True):
        now = {seq_id: holding.units for seq_id, holding in frame.holdings.items()} | {_IDLE: frame.idle_units}
        changed = {seq_id: units for seq_id, units in now.items() if units != before.get(seq_id, ())}
        changed |= {seq_id: () for seq_id in before.keys() - now.keys()}
        steps.append(_step(frame, row, changed))
        before = now
    return {
        "system": film.system,
        "unit": film.unit_name,
        "unitTokens": film.unit_tokens,
        "units": film.num_units,
        "requests": {r.seq_id: [r.prompt_tokens, r.output_tokens] for r in film.requests},
        "steps": steps,
    }


def _step(frame: Frame, row: dict[Any, Any], changed: dict[int, tuple[int, ...]]) -> dict[str, object]:
    """Times in milliseconds; `own` has the units of requests whose units have changed."""
    step: dict[str, object] = {
        "t": round(row["start_ps"] / 1e9, 3),
        "ms": round(row["duration_ps"] / 1e9, 3),
        "wait": int(row["waiting"]),
        "len": {seq_id: holding.length for seq_id, holding in frame.holdings.items()},
        "own": changed,
        "dec": len(frame.decodes),
    }
    extras = {
        "pre": frame.prefills, "gone": frame.preempted, "out": frame.swapped_out, "in": frame.swapped_in,
        "act": len(frame.actions), "ahead": len(frame.ahead),
    }  # fmt: skip
    return step | {name: value for name, value in extras.items() if value}

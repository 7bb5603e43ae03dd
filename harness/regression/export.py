"""JSON for github-action-benchmark: `customSmallerIsBetter`, and beside it `customBiggerIsBetter`.

Each file of that tool holds one kind, so `--json figures.json` writes figures.json with what should stay small (times,
counts) and figures.bigger.json with what should stay large (live shares of the pool).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.regression.verdict import Outcome, Value


def write(path: Path, outcomes: Iterable[Outcome]) -> list[Path]:
    """Write both files; returns their paths. Raises UserError where they cannot be written."""
    values = [value for outcome in outcomes for value in outcome.values if math.isfinite(value.value)]
    files = {path: False, path.with_suffix(f".bigger{path.suffix}"): True}
    for file, bigger in files.items():
        entries = [_entry(value) for value in values if value.larger_is_better is bigger]
        try:
            file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {file}: {error.strerror}") from error
    return list(files)


def _entry(value: Value) -> dict[str, object]:
    entry: dict[str, object] = {"name": value.figure, "unit": value.unit, "value": value.value}
    return entry | ({"range": value.spread} if value.spread else {})

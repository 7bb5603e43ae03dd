"""Embedded length tables: the joint distribution of prompt and output lengths, without the data.

A table cuts both marginals into 32 bins of equal probability and counts the data's requests in each of the 32 x 32
cells. A request is drawn in two steps: a cell by its count, then a place in the cell, which the two inverse CDFs turn
into lengths. All of it is integer arithmetic (probabilities are multiples of 2**-32), so that a seed gives the same
trace everywhere. `length_tables/SOURCES.md` names the data.
"""

import csv
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.seeded import Stream
from kvarena.harness.trace.recipes import Recipe
from kvarena.harness.trace.trace import Ints, Trace

_FOLDER = Path(__file__).parent / "length_tables"
_BINS = 32
_BIN_BITS = 27  # a bin is 2**27 wide: 32 of them make 2**32
_KNOT_BITS = 14  # the files state probabilities that are multiples of 2**-14
_TRIES = 16
_CUT_SHARE = 0.01  # a warning beyond: the context is too short for the table, whose shape then suffers
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LengthTable:
    """One table as it is drawn from."""

    name: str
    num_records: int  # requests of the data behind it
    knots: Ints  # [267] probabilities, in units of 2**-32
    prompt: Ints  # [267] inverse CDF of the prompt's length at the knots, tokens
    output: Ints  # [267] of the output's
    cumulated: Ints  # [1024] running count over the cells, row = prompt bin, column = output bin


def table_names() -> list[str]:
    """Names of the embedded tables."""
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


@cache
def length_table(name: str) -> LengthTable:
    """Read an embedded table. Raises UserError with the names there are."""
    if name not in table_names():
        raise UserError(f"trace.table={name}: no such length table. There are: {', '.join(table_names())}")
    with (_FOLDER / f"{name}.csv").open(newline="") as file:
        rows = {row[0]: row[1:] for row in csv.reader(line for line in file if not line.startswith("#"))}
    knots = np.rint(np.array(rows["p"], float) * 2**_KNOT_BITS).astype(np.int64) << (32 - _KNOT_BITS)
    counts = np.array([rows[f"w{row}"] for row in range(_BINS)], np.int64)
    return LengthTable(
        name=name,
        num_records=int(counts.sum()),
        knots=knots,
        prompt=np.array(rows["prompt"], np.int64),
        output=np.array(rows["output"], np.int64),
        cumulated=np.cumsum(counts.ravel()),
    )


def sample(table: LengthTable, count: int, seed: int, recipe: Recipe) -> Trace:
    """Draw `count` requests within a recipe's bounds; the first n of them are those of a draw of n.

    A request outside the bounds is drawn again inside its own cell, so that the cells keep their weights; after 16
    tries it is cut to them. The trace's provenance tells how many were cut.
    """
    cell = np.searchsorted(table.cumulated, Stream(seed, "cells").below(count, table.num_records), side="right")
    prompt, output = np.zeros(count, np.int64), np.zeros(count, np.int64)
    outside = np.arange(count)  # requests not yet within the bounds
    for attempt in range(_TRIES):
        place = Stream(seed, f"places {attempt}").words(count, 2 * _BIN_BITS)[outside]
        prompt[outside] = _inverse_cdf(table.knots, table.prompt, cell[outside] // _BINS, place >> _BIN_BITS)
        output[outside] = _inverse_cdf(table.knots, table.output, cell[outside] % _BINS, place % 2**_BIN_BITS)
        outside = outside[~recipe.keeps(prompt[outside], output[outside])]
        if not len(outside):
            break
    prompt[outside], output[outside] = _cut(prompt[outside], output[outside], recipe)
    if len(outside) > _CUT_SHARE * count:
        _log.warning("%s: %d of %d requests were cut to %d tokens", table.name, len(outside), count, recipe.max_total)
    facts = {"table": table.name, "table_records": table.num_records, "recipe": recipe.name, "seed": seed}
    facts |= {"requests": count, "max_total": recipe.max_total, "cut": len(outside)}
    return Trace(table.name, f"length table {table.name}", prompt, output, provenance=facts)


def _inverse_cdf(knots: Ints, values: Ints, bins: Ints, place: Ints) -> Ints:
    """The lengths at these places of these bins: linear between knots, rounded half up."""
    at = (bins << _BIN_BITS) + place
    left = np.searchsorted(knots, at, side="right") - 1
    width = knots[left + 1] - knots[left]
    rise = (at - knots[left]) * (values[left + 1] - values[left])
    length: Ints = values[left] + (2 * rise + width) // (2 * width)
    return length


def _cut(prompt: Ints, output: Ints, recipe: Recipe) -> tuple[Ints, Ints]:
    longest_prompt = min(recipe.max_prompt, recipe.max_total - recipe.min_output)
    prompt = np.clip(prompt, recipe.min_prompt, longest_prompt)
    return prompt, np.clip(output, recipe.min_output, recipe.max_total - prompt)

"""Make a length table from a file of lengths: aggregate statistics that can be passed on where the data cannot.

    python -m kvarena.harness.trace.tabulate_lengths <file> <table.csv>

`length_table.py` draws from a table. A file with the columns conversation_id and new_prompt_tokens becomes a table of
conversations: of questions instead of whole prompts, and with the number of turns.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvarena.errors import UserError
from kvarena.harness.trace.length_table import length_table

_BINS = 32


def tabulate(prompt: NDArray[np.int64], output: NDArray[np.int64], turns: NDArray[np.int64] | None = None) -> str:
    """The text of a table. Lengths are [N]; `turns` are those of each conversation."""
    p = length_table("sharegpt").knots / 2**32  # the same probabilities in every table
    rows: dict[str, Iterable[object]] = {
        "p": [f"{each:.6g}" for each in p],
        "prompt": np.quantile(prompt, p, method="inverted_cdf").astype(np.int64),
        "output": np.quantile(output, p, method="inverted_cdf").astype(np.int64),
    }
    if turns is not None:
        rows["turns"] = np.bincount(turns)[1:]
    counts = np.zeros((_BINS, _BINS), np.int64)
    np.add.at(counts, (_bins(prompt), _bins(output)), 1)
    rows |= {f"w{i}": row for i, row in enumerate(counts)}
    return "".join(",".join([name, *map(str, values)]) + "\n" for name, values in rows.items())


def _bins(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bins of equal probability: equal lengths are dealt out at random, so that a bin border takes no side."""
    ties = np.random.default_rng(0).random(len(lengths))
    rank = np.empty(len(lengths), np.int64)
    rank[np.lexsort((ties, lengths))] = np.arange(len(lengths))
    return rank * _BINS // len(lengths)


def main(arguments: list[str]) -> None:
    """The command above. Raises UserError for other than two arguments."""
    if len(arguments) != 2:
        raise UserError("takes two arguments: a CSV file of lengths, and the table to write")
    data = pd.read_csv(arguments[0])
    if "new_prompt_tokens" in data:
        turns = np.unique(data.conversation_id, return_counts=True)[1]
        text = tabulate(data.new_prompt_tokens.to_numpy(), data.output_tokens.to_numpy(), turns)
    else:
        text = tabulate(data.prompt_tokens.to_numpy(), data.output_tokens.to_numpy())
    Path(arguments[1]).write_text(f"# {Path(arguments[1]).stem}: n={len(data)}\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])

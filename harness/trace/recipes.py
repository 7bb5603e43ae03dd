"""Filters by name: which requests of a data set the papers and tools keep.

A request outside a recipe's bounds is left out, which is no fault of the record; it is counted apart from the
malformed ones. The same bounds confine what is drawn from a length table.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvarena.errors import UserError
from kvarena.harness.trace.trace import Ints

NO_LIMIT = 2**31 - 1  # longest length a trace may state, in tokens


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bounds on lengths in tokens, all inclusive."""

    name: str
    min_prompt: int = 1
    min_output: int = 1
    max_prompt: int = NO_LIMIT
    max_total: int = NO_LIMIT
    any_first_turn: bool = False  # ShareGPT: take the first two turns even if the assistant speaks first

    def keeps(self, prompt: Ints, output: Ints) -> NDArray[np.bool_]:
        """Which requests are within the bounds: [N]."""
        return (
            (prompt >= self.min_prompt)
            & (prompt <= self.max_prompt)
            & (output >= self.min_output)
            & (prompt + output <= self.max_total)
        )

    def within(self, max_tokens: int | None) -> "Recipe":
        """The same recipe within a context of `max_tokens`. Raises UserError where that holds no request."""
        if max_tokens is None:
            return self
        if max_tokens < self.min_prompt + self.min_output:
            raise UserError(f"trace.max_tokens={max_tokens}: no room for {self.min_prompt} + {self.min_output} tokens")
        return replace(self, max_total=min(self.max_total, max_tokens))


_RECIPES = (
    Recipe("none"),
    Recipe("paper_figure", max_total=2048),  # PagedAttention Fig 11
    Recipe("paper_artifact", max_total=2047),  # replays of its SOSP'23 artifact: prompt + output < 2048
    Recipe("vllm", 4, 4, max_prompt=1024, max_total=2048, any_first_turn=True),  # `vllm bench serve`
    Recipe("fits_context"),  # ours: whatever the model's context holds
)


def recipe(name: str, max_tokens: int | None) -> Recipe:
    """The recipe of that name. Raises UserError with the names there are."""
    found = {each.name: each for each in _RECIPES}
    if name not in found:
        raise UserError(f"trace.filter={name}: no such recipe. There are: {', '.join(found)}")
    if name != "fits_context":
        return found[name]
    if max_tokens is None:
        raise UserError("trace.filter=fits_context needs a context: set trace.max_tokens")
    return found[name].within(max_tokens)

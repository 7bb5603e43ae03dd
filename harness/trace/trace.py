"""A trace: the lengths of its requests, and where they come from."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trace:
    """N requests, in order. All arrays are [N]; lengths are in tokens and at least 1."""

    name: str  # the file's where there is one, else the table's or the configuration's
    source: str  # file, hub name, table or rule
    prompt_tokens: Ints
    output_tokens: Ints
    arrival_s: NDArray[np.float64] | None = None  # recorded, in seconds since the trace began
    conversation_ids: Ints | None = None  # equal for the turns of one conversation
    hash_ids: tuple[Ints, ...] | None = None  # ids of each prompt's blocks, in Mooncake's traces and those like them
    block_tokens: int | None = None  # tokens of a block that an id stands for
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.prompt_tokens) == len(self.output_tokens), "prompts and outputs differ in number"

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def total_tokens(self) -> Ints:
        """Prompt + output of each request."""
        return self.prompt_tokens + self.output_tokens

    def take(self, index: Ints) -> "Trace":
        """The requests at these positions, in this order; a position may come twice."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            arrival_s=None if self.arrival_s is None else self.arrival_s[index],
            conversation_ids=None if self.conversation_ids is None else self.conversation_ids[index],
            hash_ids=None if self.hash_ids is None else tuple(self.hash_ids[i] for i in index),
        )

    def cut(self, prompt: int | None, output: int | None) -> "Trace":
        """The same requests, longer prompts and outputs cut to so many tokens; None cuts nothing.

        A cut prompt begins later: its blocks are no longer those that `hash_ids` names, which are dropped.
        """
        if prompt is None and output is None:
            return self
        longest = np.iinfo(np.int64).max
        return replace(
            self,
            prompt_tokens=np.minimum(self.prompt_tokens, longest if prompt is None else prompt),
            output_tokens=np.minimum(self.output_tokens, longest if output is None else output),
            hash_ids=self.hash_ids if prompt is None else None,
            provenance={**self.provenance, "cut_prompt": prompt, "cut_output": output},
        )

    def noting(self, **facts: Any) -> "Trace":
        """The same requests, with more said of where they come from."""
        return replace(self, provenance={**self.provenance, **facts})


class Histogram(NamedTuple):
    """Lengths by bins of one width, as PagedAttention's Fig 11 draws them."""

    left: NDArray[np.float64]  # [bins], tokens: where each bin begins
    counts: Ints  # [bins], requests
    density: NDArray[np.float64]  # [bins], share of the requests per token


def length_histogram(lengths: Ints, num_bins: int = 128) -> Histogram:
    """Histogram over [shortest, longest]; Fig 11 has 128 bins."""
    counts, edges = np.histogram(lengths, bins=num_bins)
    density = counts / (counts.sum() * np.diff(edges))
    return Histogram(edges[:-1], counts.astype(np.int64), density)

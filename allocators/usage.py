"""Where every byte of the pool is: nine leaves, taken after scheduling and before the forward pass.

A sequence owns an extent of positions, [0, capacity). Along it, with `final` = prompt + true output and `bound` =
the length the policy promised (= final where it promised none):

    0          length        final          bound      end of the unit        capacity
    |   live   |   reserved  | over_estimate | rounding that covers both | retained |

Bytes that no sequence owns are `stranded` (enough in sum for the request at the head of the line, but of no use
to it for their shape), `free`, or `remainder` (they form no whole unit). The nine sum to the pool, always.
"""

from itertools import pairwise
from typing import NamedTuple


class Usage(NamedTuple):
    """Bytes by leaf; the first that matches wins. `deferred`, `surplus`, `premapped` split `retained`."""

    live: int = 0  # K/V of a position already written, or written in this step; shared bytes once
    cached: int = 0  # valid K/V that only a prefix index can find
    reserved: int = 0  # attached and empty, below final: this request will write it
    over_estimate: int = 0  # attached and empty, between final and bound
    rounding: int = 0  # attached and empty, above both, within the smallest run of units covering them
    retained: int = 0  # attached otherwise; can be taken back without copying
    stranded: int = 0  # unattached, refused to the head of the line for its shape
    free: int = 0  # unattached, the watermark included
    remainder: int = 0  # forms no whole unit
    deferred: int = 0  # of retained: rows without a request
    surplus: int = 0  # of retained: whole units inherited or mapped ahead, beyond the final unit
    premapped: int = 0  # of retained: the idle slot mapped ahead

    @property
    def leaves(self) -> tuple[int, ...]:
        """The nine leaves, in order."""
        return self[:9]

    @property
    def pool(self) -> int:
        """Their sum: the bytes of the pool."""
        return sum(self[:9])


LEAVES: tuple[str, ...] = Usage._fields[:9]


def extent_usage(length: int, final: int, bound: int, unit_end: int, capacity: int) -> tuple[int, int, int, int, int]:
    """Split an extent of `capacity` positions (or bytes) into live, reserved, over_estimate, rounding, retained.

    `unit_end` is where the unit that covers max(final, bound) ends. All five arguments count from the start of
    the extent and share one unit; the results sum to `capacity`.
    """
    marks = [0]
    for mark in (length, final, bound, unit_end, capacity):
        marks.append(max(marks[-1], min(mark, capacity)))
    live, reserved, over_estimate, rounding, retained = (b - a for a, b in pairwise(marks))
    return live, reserved, over_estimate, rounding, retained


def paper_rollup(usage: Usage) -> dict[str, int]:
    """The four kinds of PagedAttention's Fig 2, as its artifact draws them."""
    return {
        "token_states": usage.live + usage.cached,
        "reservation": usage.reserved,
        "internal_fragmentation": usage.over_estimate,
        "external_fragmentation_and_others": sum(usage.leaves[4:]),
    }


def paper_vllm_rollup(usage: Usage) -> dict[str, int]:
    """Fig 2's vLLM bar by its true meaning: the paper's plot script mislabels two of its slivers."""
    return {
        "token_states": usage.live + usage.cached,
        "last_block_waste": usage.reserved + usage.over_estimate + usage.rounding + usage.retained,
        "free_blocks": usage.stranded + usage.free + usage.remainder,
    }


def strict_rollup(usage: Usage) -> dict[str, int]:
    """Six kinds that keep apart what the paper's four mix."""
    return {
        "token_states": usage.live + usage.cached,
        "reservation": usage.reserved,
        "internal_fragmentation": usage.over_estimate + usage.rounding,
        "reclaimable": usage.retained,
        "external_fragmentation": usage.stranded,
        "free": usage.free + usage.remainder,
    }

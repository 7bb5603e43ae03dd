"""Block copies, batched: one indexing operation moves many blocks in all layers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvarena.allocators.actions import Action, CopyBlock, SwapIn, SwapOut

Copy = CopyBlock | SwapOut | SwapIn


class Batch(NamedTuple):
    """Copies of one kind that may happen all at once."""

    kind: type[Copy]
    sources: list[int]
    targets: list[int]


def batches(actions: Sequence[Action]) -> Iterator[Batch]:
    """Copies in the order of the actions; within a batch no block is read or written after it was written.

    Raises ValueError for an action that is no copy.
    """
    batch: Batch | None = None
    written: set[int] = set()
    for action in actions:
        if not isinstance(action, Copy):
            raise ValueError(f"{type(action).__name__} is not a copy of a block")
        in_one_pool = isinstance(action, CopyBlock)
        clash = action.target in written or (in_one_pool and action.source in written)
        if batch is None or type(action) is not batch.kind or clash:
            if batch is not None:
                yield batch
            batch, written = Batch(type(action), [], []), set()
        batch.sources.append(action.source)
        batch.targets.append(action.target)
        written.add(action.target)
    if batch is not None:
        yield batch

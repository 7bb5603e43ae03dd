"""The block table of a batch, kept because the next one is nearly the same.

Comparing a sequence's blocks with those of the last step costs a hundredth of writing them out; where they grew, only
the new ones are written. A batch in another order is correct, only slower.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kvarena.allocators.memory.staging import staging_buffer


class KnownBlocks:
    """What each row of a table holds."""

    def __init__(self) -> None:
        self._known: list[list[int]] = []

    def changes(self, blocks: Sequence[list[int]]) -> Iterator[tuple[int, int, list[int]]]:
        """(row, first column, blocks from there on) of every row that must be written to hold `blocks`."""
        self._known += [[] for _ in range(len(blocks) - len(self._known))]
        for row, (known, now) in enumerate(zip(self._known, blocks, strict=False)):
            if known != now:
                same = len(known) if known == now[: len(known)] else 0
                self._known[row] = now.copy()
                yield row, same, now[same:]

    def forget(self) -> None:
        """Know nothing: the next batch is written whole."""
        self._known = []


class BlockTable:
    """A table on the host."""

    def __init__(self) -> None:
        self._known = KnownBlocks()
        self._array = np.zeros((0, 0), dtype=np.int32)

    def update(self, blocks: Sequence[list[int]]) -> Tensor:
        """[B, longest] int32, a tensor of its own: a view stays valid whatever comes after it."""
        width = max(map(len, blocks))
        self._reserve(len(blocks), width)
        for row, first, new in self._known.changes(blocks):
            self._array[row, first : first + len(new)] = new
        return torch.from_numpy(self._array[: len(blocks), :width].copy())

    def _reserve(self, rows: int, width: int) -> None:
        """Double the array where it is too small."""
        old_rows, old_width = self._array.shape
        if rows > old_rows or width > old_width:
            grown = np.zeros((max(rows, 2 * old_rows), max(width, 2 * old_width)), dtype=np.int32)
            grown[:old_rows, :old_width] = self._array
            self._array = grown


class DeviceBlockTable:
    """A table on a GPU, at a fixed address: a step sends what changed, in one asynchronous copy, and scatters it."""

    def __init__(self, device: torch.device, num_rows: int, width: int) -> None:
        """For batches of up to `num_rows` sequences of up to `width` blocks; a larger batch moves it."""
        self._device, self._known = device, KnownBlocks()
        self._table = torch.zeros((num_rows, width), dtype=torch.int32, device=device)

    def update(self, blocks: Sequence[list[int]]) -> Tensor:
        """[B, longest] int32, rows `width` apart; the next update overwrites it, in stream order."""
        longest = max(map(len, blocks))
        num_rows, width = self._table.shape
        if len(blocks) > num_rows or longest > width:
            self._table = self._table.new_zeros((max(len(blocks), 2 * num_rows), max(longest, width)))
            self._known.forget()
        changes = list(self._known.changes(blocks))
        if changes:
            self._send(changes)
        return self._table[: len(blocks), :longest]

    def _send(self, changes: Sequence[tuple[int, int, list[int]]]) -> None:
        """One buffer: where to write, as int64, and behind it what."""
        width = self._table.shape[1]
        where: list[int] = []
        what: list[int] = []
        for row, first, new in changes:
            start = row * width + first
            where += range(start, start + len(new))
            what += new
        count = len(what)
        buffer, words = staging_buffer(3 * count, self._device)
        words[: 2 * count].view(np.int64)[:] = where
        words[2 * count :] = what
        sent = buffer.to(self._device, non_blocking=True)
        self._table.view(-1).index_copy_(0, sent[: 2 * count].view(torch.int64), sent[2 * count :])

"""Mapping beside the iteration before (section 6.1.1): each row is mapped one token ahead as soon as it is full.

    tokens at a step's end    6   7   8   9  10  11      page-groups of 3 1/2 tokens: the third is mapped beside the
    page-groups after it      2   3   3   3   4   4      step that ends with 7 tokens, the fourth at 10

The same arithmetic lets a clock jump over many steps and still know which page-groups were mapped, and when, and when
idle rows gave some back to keep `threshold` free.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action
from kvarena.allocators.vattention.books import Held
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Row, Rows


class Overlap:
    """Mapping ahead, one step or many at once. Memory is counted in page-groups over all tensors."""

    def __init__(self, rows: Rows, reclamation: Reclamation, threshold: int) -> None:
        """Rows without a request give back while less than `threshold` is free."""
        self._rows = rows
        self._reclamation = reclamation
        self._threshold = threshold
        self._geometry = rows.geometries[0]

    def map_ahead(self, actions: list[Action]) -> None:
        """Map one token ahead of every live row that is full, in order of admission, as far as memory lasts.

        What others were mapped for their next iteration is not touched.
        """
        rows, full = self._rows, self._full()
        missing = [rows.missing(row, row.length + 1) for row in full]
        wanted = sum(missing)
        if wanted > rows.free:
            self._reclamation.make_room_ahead(wanted, actions)
        if wanted > rows.free and wanted > (left := self._reclamation.obtainable(margin=1)):
            wanted, candidates, full = 0, full, []
            for row, lacking in zip(candidates, missing, strict=True):
                if lacking <= left - wanted:
                    full.append(row)
                    wanted += lacking
        self._reclamation.take_back(wanted, actions, margins=(1,))
        for row in full:
            rows.map(row, row.length + 1, actions)

    def _full(self) -> list[Row]:
        """Live rows that their next token outgrows."""
        return [row for row in self._rows.live.values() if row.length == row.capacity < self._rows.max_tokens]

    # ---- many steps at once: rows of one layer group without a window ------------------------------------------

    def quiet_steps(self, seq_ids: Seq[int], limit: int, most: int) -> int:
        """Steps, `limit` at most, for which what is free or in idle rows suffices, and none maps over `most`
        page-groups of each tensor.
        """
        live, g = self._rows.live, self._geometry
        rows = [live[seq_id] for seq_id in seq_ids]
        if any([row.length >= row.capacity for row in rows]):
            return 0  # it was not mapped ahead, for want of memory
        filling = [(row.length + 1, len(row.page_groups[0])) for row in rows if row.length + limit >= row.capacity]

        def wanted(steps: int) -> int:
            return sum([max(0, g.page_groups_for(length + steps) - mapped) for length, mapped in filling])

        spare = (self._rows.free + self._reclamation.deferred) // g.num_tensors
        if wanted(limit) > spare:
            limit = bisect_right(range(limit), spare, key=wanted) - 1
        if len(filling) * g.page_groups_for(1) <= most:
            return limit
        mapped = Counter(step for row in rows for step in self._steps_that_map(row, row.length + limit))
        return min([step - 1 for step, count in mapped.items() if count > most], default=limit)

    def advance(self, seq_ids: Seq[int], steps: int, actions: list[Action]) -> Held:
        """Let these rows grow by so many quiet steps, and map and give back what that takes."""
        rows, g = self._rows, self._geometry
        sums, free, deferred = rows.sums, rows.free, self._reclamation.deferred
        mapped: Counter[int] = Counter()  # page-groups of each tensor, by step
        covered = rounded = 0
        for seq_id in seq_ids:
            row = rows.live[seq_id]
            length = row.length + steps
            if length < row.capacity and length <= row.enough_until:
                row.length = length
                continue
            taken = self._steps_that_map(row, length)
            for place, step in enumerate(taken, len(row.page_groups[0])):
                mapped[step] += 1
                left = steps - step + 1
                covered += left * min(g.page_group, max(0, g.resident_bytes(row.final) - place * g.page_group))
                rounded += left * (g.page_group if place < g.page_groups_for(row.final) else 0)
            self._reclamation.take_back_idle(len(taken) * g.num_tensors, actions)
            row.length = length
            rows.map(row, length + 1, actions)
        self._reclamation.take_back_idle(self._threshold, actions)
        mapped_steps = sum([count * (steps - step + 1) for step, count in mapped.items()])
        return Held(
            steps * sums.mapped + g.num_tensors * mapped_steps,
            steps * sums.covered + g.num_tensors * covered,
            steps * sums.rounded + g.num_tensors * rounded,
            steps * deferred - self._given_back(mapped, steps, free, deferred),
        )

    def _steps_that_map(self, row: Row, length: int) -> list[int]:
        """The step, from 1, beside which each page-group is mapped that the row takes to grow to `length` tokens."""
        g, last = self._geometry, min(length + 1, self._rows.max_tokens)
        return [
            g.tokens_in(place, last) - row.length for place in range(len(row.page_groups[0]), g.page_groups_for(last))
        ]

    def _given_back(self, mapped: Counter[int], steps: int, free: int, deferred: int) -> int:
        """Page-groups that idle rows have given back after a step, summed over the steps."""
        tensors, total = self._geometry.num_tensors, 0
        short = self._threshold - free
        if not deferred or short + tensors * mapped.total() <= 0:
            return 0
        for step in range(1, steps + 1):
            short += tensors * mapped[step]
            total += min(max(0, -(-short // tensors) * tensors), deferred)
        return total

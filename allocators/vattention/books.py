"""Where every byte of vAttention's pool is, and which sequence has which page-groups."""

from collections.abc import Iterable
from typing import NamedTuple

from kvarena.allocators.holding import Holding, Holdings, Units
from kvarena.allocators.integrity import expect
from kvarena.allocators.policy import Sequence
from kvarena.allocators.usage import Usage, extent_usage
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.prefix_cache import RowCache
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Rows


class Held(NamedTuple):
    """What rows hold after a step, `Marks` and `deferred` in part; or the sums of that over many steps."""

    mapped: int  # page-groups, in rows in use
    covered: int  # bytes
    rounded: int  # bytes
    deferred: int  # page-groups


class Books:
    """Leaves, from the sums that rows keep."""

    def __init__(self, rows: Rows, reclamation: Reclamation, cache: RowCache | None, pool_bytes: int) -> None:
        self._rows = rows
        self._reclamation = reclamation
        self._cache = cache
        self.pool_bytes = pool_bytes
        self._page_group = rows.geometries[0].page_group  # bytes

    def usage(self) -> Usage:
        """Every byte in one leaf."""
        sums = self._rows.sums
        held = Held(sums.mapped, sums.covered, sums.rounded, self._reclamation.deferred)
        return self.usage_of(self._rows.live_bytes, held, 1)

    def usage_of(self, live: int, held: Held, steps: int) -> Usage:
        """Leaves, summed over steps. Nothing is promised, so nothing is over-estimated."""
        size, rows = self._page_group, self._rows
        mapped, covered, rounded, deferred = held
        premapped = self._reclamation.premapped * steps
        free = rows.total * steps - mapped - deferred - premapped
        surplus = mapped * size - rounded
        cached = 0 if self._cache is None else self._cache.cached.held * size * steps
        return Usage(
            live=live - cached,
            cached=cached,
            reserved=covered - live,
            rounding=rounded - covered,
            retained=(deferred + premapped) * size + surplus,
            free=free * size,
            remainder=(self.pool_bytes - rows.total * size) * steps,
            deferred=deferred * size,
            surplus=surplus,
            premapped=premapped * size,
        )

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings | None:
        """The page-groups of their rows, those that they share too; and those of rows without a request: deferred, or
        pre-mapped. For a model with one layer group.
        """
        if len(self._rows.geometries) > 1:
            return None
        [g], [pool] = self._rows.geometries, self._rows.pools
        live = {row.index for row in self._rows.live.values()}
        idle = tuple(each for row in self._rows.all if row.index not in live for each in row.page_groups[0])
        units = Units("page-group in every tensor", pool.size, g.page_group / g.token_stride)
        return Holdings(units, {seq.seq_id: self._holding(seq, g) for seq in seqs}, idle)

    def _holding(self, seq: Sequence, g: RowGeometry) -> Holding:
        row = self._rows.live[seq.seq_id]
        [mapped] = row.page_groups
        final, end = g.resident_bytes(seq.final_tokens), g.page_groups_for(seq.final_tokens) * g.page_group
        leaves = extent_usage(g.resident_bytes(row.length), final, final, end, len(mapped) * g.page_group)
        return Holding(row.length, tuple(mapped), tuple(g.num_tensors * leaf for leaf in leaves))

    def check_integrity(self) -> None:
        """Recount the leaves, row by row."""
        usage = self.usage()
        live, *others = self._rows.recounted_leaves()
        expect("live to retained", usage[:6], (live - usage.cached, usage.cached, *others))
        expect("deferred + surplus + premapped", usage.deferred + usage.surplus + usage.premapped, usage.retained)
        expect("leaves are none or more", min(usage) >= 0, True)
        expect("sum of the leaves", usage.pool, self.pool_bytes)

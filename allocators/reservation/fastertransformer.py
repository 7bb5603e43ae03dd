"""FasterTransformer's padded batches, as the PagedAttention paper runs them (section 6.1, and its artifact).

Up to `batch_size` requests run to the end together. Every row is as wide as the longest prompt and the longest output
of the batch, so what a shorter request does not fill is padding:

    row 0   ....PPPPPPOOOO......        P prompt, O output, . padding
    row 1   PPPPPPPPPPOOO.......        width = longest prompt + longest output
    row 2   .......PPPOOOOOOOOOO

The batch is open until its first step, and is given back as a whole. A row that is done goes on to the
end of the batch; what is written past its final length is padding too.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.actions import Action, CopyRow
from kvarena.allocators.forking import Forking
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.limits import check_counts
from kvarena.allocators.memory.pending_copies import PendingCopies, row_copies
from kvarena.allocators.policy import Admission, IntegrityError, NotResidentError, Policy, Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.ledger import Extent, Ledger, resident_bytes
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class FasterTransformerConfig:
    """Padded batches. The artifact has 5 rows (13B), 2 (66B), 24 (175B) on ShareGPT, and 14, 8, 80 on Alpaca."""

    name: str = "fastertransformer"
    batch_size: int = 5  # rows
    max_padded_tokens: int = 2040  # longest prompt + longest output of a batch; a lone request may pass it

    def __post_init__(self) -> None:
        """Raises UserError for a batch without rows, or rows without tokens."""
        check_counts(batch_size=self.batch_size, max_padded_tokens=self.max_padded_tokens)


class _OneBatch(Forking):
    """Gangs of one padded batch."""

    def keep_prefix(self, prefix_id: int, tokens: int) -> None:
        """Raises UserError: a batch ends as a whole, so that nothing outlives it."""
        raise UserError(f"allocator={self._policy.name} keeps no prefixes: a batch is given back as a whole")


@allocator(FasterTransformerConfig())
class FasterTransformerPolicy(Policy):
    """Rows of one padded batch, which lie one after the other from the start of the pool."""

    name = "fastertransformer"
    memory_layout = Layout.CONTIGUOUS
    pads = True
    row_tokens = 1  # tokens from one row index to the next: rows overlap
    sharing: Forking

    def __init__(self, config: FasterTransformerConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self._batch_size = config.batch_size
        self._max_padded_tokens = min(config.max_padded_tokens, max_tokens)  # a row fits the model's context
        self._bytes_of = resident_bytes(kv_layout)
        self._books = Ledger(self._bytes_of)
        self._pending = PendingCopies(self._copies)
        self._actions: list[Action] = []
        self.sharing = _OneBatch(self, self._fork)
        self._start_batch()

    def _start_batch(self) -> None:
        self._open = True
        self._rows: dict[int, int] = {}  # seq_id -> its row's ordinal, those that have left included
        self._lengths: dict[int, int] = {}  # positions given, padding at the end included
        self._prompt = self._output = 0  # the longest of the batch, tokens

    @property
    def width(self) -> int:
        """Tokens of every row of the batch."""
        return self._prompt + self._output

    def refusal(self, admission: Admission) -> str:
        """A gang must fit the context and, as a batch of its own, the pool."""
        rows, tokens = len(admission.gang), admission.gang[0].final_tokens
        fits = rows <= self._batch_size and rows * self._bytes_of(tokens) <= self.pool_bytes
        return "" if fits and tokens <= self.max_tokens else self._never_fits(admission)

    def can_admit(self, admission: Admission) -> bool:
        """Whether the batch is open, has rows left, and would be neither too wide nor too large."""
        seq = admission.gang[0]
        width = max(self._prompt, seq.prompt_tokens) + max(self._output, seq.output_tokens)
        rows = len(self._rows) + len(admission.gang)
        if not self._open or admission.tokens > seq.final_tokens:
            return False
        narrow = not self._rows or width <= self._max_padded_tokens
        return narrow and rows <= self._batch_size and rows * self._bytes_of(width) <= self.pool_bytes

    def admit(self, admission: Admission) -> int | None:
        """Add rows to the batch; all rows become as wide as these need."""
        return self.sharing.admit(admission, self._add_row) if self.can_admit(admission) else None

    def _add_row(self, seq: Sequence, tokens: int) -> None:
        if seq.seq_id in self._books.extents:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        self._prompt = max(self._prompt, seq.prompt_tokens)
        self._output = max(self._output, seq.output_tokens)
        self._books.widen(self.width)
        self._rows[seq.seq_id] = len(self._rows)
        self._lengths[seq.seq_id] = tokens
        self._books.add(seq.seq_id, Extent(tokens, seq.final_tokens, seq.final_tokens, self.width))

    def _fork(self, parent_id: int, child: Sequence) -> bool:
        """Copy a row: to a further row of an open batch, to the row of somebody who has left a closed one."""
        if parent_id not in self._lengths:
            raise NotResidentError(parent_id)
        tokens = self._lengths[parent_id]
        if self._open and self.can_admit(Admission([child], tokens)):
            self._add_row(child, tokens)
        elif self._open or not self._inherit_row(child, tokens):
            return False
        self._pending.owe(parent_id, child.seq_id, tokens, self._actions)
        return True

    def _inherit_row(self, seq: Sequence, tokens: int) -> bool:
        if seq.seq_id in self._lengths:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        left = next((i for i in (seq.seq_id, *self._rows) if i in self._rows and i not in self._lengths), None)
        if left is None or seq.final_tokens > self.width:
            return False
        self._rows[seq.seq_id] = self._rows.pop(left)
        self._lengths[seq.seq_id] = tokens
        self._books.add(
            seq.seq_id, Extent(min(tokens, seq.final_tokens), seq.final_tokens, seq.final_tokens, self.width)
        )
        return True

    def _copies(self, source_id: int, target_id: int, tokens: int) -> Iterable[CopyRow]:
        return row_copies(self.kv_layout, self.row(source_id), self.row(target_id), tokens)

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens left in the row, which never gets wider once it has grown."""
        return self.width - self._lengths[seq_id]

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Fill `tokens` more positions of the row. From now on nobody joins the batch."""
        if tokens > self.tokens_until_growth(seq_id):
            return False
        self._open = False  # from here on it is known where rows begin
        self._pending.pay([seq_id], self._actions)
        extent = self._books.extents[seq_id]
        self._lengths[seq_id] += tokens
        self._books.grow(seq_id, min(self._lengths[seq_id], extent.final) - extent.length)
        return True

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """As of any policy, but only until a row reaches its final length, where it begins to be padding."""
        if self._pending.active or self._actions:
            return 0
        extents = map(self._books.extents.__getitem__, seq_ids)
        until_padding = [extent.final - extent.length for extent in extents if extent.length < extent.final]
        return min([super().quiet_steps(seq_ids, limit), *until_padding])

    def release(self, seq_id: int) -> None:
        """Leave the batch. Its memory stays attached until the last row has left."""
        if seq_id not in self._lengths:
            raise NotResidentError(seq_id)
        self._open = False
        self._pending.leave(seq_id, self._actions)
        self._actions = self._pending.without_copies_to([self.row(seq_id)], self._actions)
        self._books.remove(seq_id)
        del self._lengths[seq_id]
        if not self._books.extents:
            self._start_batch()

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._lengths[seq_id]

    def row(self, seq_id: int) -> int:
        """First token of a sequence's row. Known once the batch is closed."""
        if seq_id not in self._lengths:
            raise KeyError(seq_id)
        return self._rows[seq_id] * self.width

    def drain(self) -> list[Action]:
        """Hand over the copies of prompts that members of a group are owed. A step begins: rows must not move now."""
        self._open = not self._rows
        actions, self._actions = self._actions, []
        self._pending.handed_over()
        return actions

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf: padding is rounding, rows that have left are deferred."""
        live, reserved, over_estimate, rounding = self._books.leaves()
        batch_bytes = len(self._rows) * self._bytes_of(self.width)
        deferred = batch_bytes - self._books.capacity_bytes
        free = self.pool_bytes - batch_bytes
        return Usage(live, 0, reserved, over_estimate, rounding, deferred, 0, free, 0, deferred=deferred)

    def check_integrity(self) -> None:
        """Recount the leaves, and that the batch keeps its limits."""
        self._books.check_integrity()
        if any(extent.capacity != self.width for extent in self._books.extents.values()):
            raise IntegrityError(f"rows are not all {self.width} tokens wide: {self._books.extents}")
        if not self._books.extents.keys() <= self._rows.keys() or len(self._rows) > self._batch_size:
            raise IntegrityError(f"rows of {list(self._rows)}, extents of {list(self._books.extents)}")
        if (usage := self.usage()).pool != self.pool_bytes or min(usage.leaves) < 0:
            raise IntegrityError(f"leaves {usage.leaves} sum to {usage.pool}, the pool is {self.pool_bytes} bytes")

"""The contract of an allocation policy: who owns which slot, block or page-group. Pure bookkeeping, no bytes.

A policy is deterministic and imports no torch: the same object decides in a measured and in a modelled run. What has
to be done to real memory it says as *actions* (`actions.py`), which a store performs or a device model prices.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.actions import Action as Action
from kvarena.allocators.actions import CopyBlock as CopyBlock
from kvarena.allocators.actions import CopyRow as CopyRow
from kvarena.allocators.actions import Map as Map
from kvarena.allocators.actions import SwapIn as SwapIn
from kvarena.allocators.actions import SwapOut as SwapOut
from kvarena.allocators.actions import Unmap as Unmap
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence as a policy sees it. `output_tokens` is the true output, known in a replay."""

    seq_id: int
    prompt_tokens: int
    output_tokens: int

    @property
    def final_tokens(self) -> int:
        """Length at its end: prompt + true output."""
        return self.prompt_tokens + self.output_tokens


class IntegrityError(AssertionError):
    """A policy's books do not add up; the message shows the sum that fails. Always a bug of ours."""


class NotResidentError(KeyError):
    """A sequence was named that owns no memory: it was released already, or never admitted. A bug of the caller."""

    def __init__(self, seq_id: int) -> None:
        super().__init__(seq_id)
        self.seq_id = seq_id

    def __str__(self) -> str:
        return f"sequence {self.seq_id} is not resident: it was released or swapped out, or never admitted"


class Policy(ABC):
    """Who owns which bytes of one pool.

    Running out is an answer (False), not an exception; a False leaves the policy as it was. A `seq_id` that is not
    resident, or is admitted twice, is a bug of the caller and raises KeyError or ValueError.
    """

    name: str
    memory_layout: Layout
    kv_layout: KVLayout
    pool_bytes: int

    @abstractmethod
    def fits_pool(self, seq: Sequence) -> bool:
        """Whether the sequence could ever run to its end, alone in an empty pool."""

    @abstractmethod
    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether `admit` would succeed now."""

    @abstractmethod
    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence memory for its first `tokens` positions (a prompt, or one to be recomputed)."""

    @abstractmethod
    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether `grow` would succeed now."""

    @abstractmethod
    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Give the sequence memory for `tokens` more positions. Many at once are legal."""

    @abstractmethod
    def release(self, seq_id: int) -> None:
        """Take back all that the sequence owns."""

    @abstractmethod
    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""

    @abstractmethod
    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte of the pool in one leaf; `head` is the request that waits at the head of the line."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Recount everything from scratch. Raises IntegrityError with the sum that does not add up."""

    def tokens_until_growth(self, seq_id: int) -> int:
        """How many more positions fit into what the sequence owns already. 0 is always a safe answer."""
        return 0

    @property
    def free_units(self) -> int | None:
        """Units (blocks) that any sequence may still take; None where growth does not draw on such a count."""
        return None

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """Give each of these sequences one more position, in this order, up to the first that finds no memory.

        Returns how many have got theirs. Where `free_units` counts units, a sequence is given nothing unless one is
        free, even if it needs none (vLLM's rule, PagedAttention's artifact).
        """
        for count, seq_id in enumerate(seq_ids):
            if self.free_units == 0 or not self.grow(seq_id):
                return count
        return len(seq_ids)

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """How many decode steps in a row, `limit` at most, these sequences can surely take with nothing to decide.

        In each of them every sequence grows by one position and finds memory, at least `margin` units stay free where
        `free_units` counts them (a gang asks for one for each of its sequences), and there is no action to perform,
        except that `look_ahead` may map, `ahead` times a step at most. The answer may be too small, never too large.
        The caller's limit lets no sequence pass its final length (only rows of a padded batch may).
        """
        if self.kv_layout.has_windows:
            return 0  # leaves of a ring that fills up do not change evenly
        return min([limit, *map(self.tokens_until_growth, seq_ids)])

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by one position, `steps` times over; the sum of `usage(head)` over these steps.

        For quiet steps only; what they map in the background is handed over by the next `look_ahead`. Here no
        sequence takes a new unit, so every leaf changes by the same amount each step.
        """
        before = self.usage(head)
        for seq_id in seq_ids:
            self.grow(seq_id, steps)
        after = self.usage(head)
        return Usage(*[steps * a + (b - a) * (steps + 1) // 2 for a, b in zip(before, after, strict=True)])

    # ---- groups: sequences of one request, which share its prompt -----------------------------------------------
    #
    # A prompt is written once, through the first member. Where members cannot share memory, the others get copies of
    # it, due as soon as one of them grows (or the first is released), by when it has been written.

    def group_fits_pool(self, seqs: Seq[Sequence]) -> bool:
        """Whether the group could ever run to its end, alone in an empty pool, its members drifting apart."""
        return self._alone(seqs) and self.fits_pool(seqs[0])

    def can_admit_group(self, seqs: Seq[Sequence], tokens: int, prefix: int | None = None) -> bool:
        """Whether `admit_group` would succeed now."""
        return self._alone(seqs, prefix) and self.can_admit(seqs[0], tokens)

    def admit_group(self, seqs: Seq[Sequence], tokens: int, prefix: int | None = None) -> bool:
        """Give every member memory for the same first `tokens` positions: all of them, or none.

        With a registered `prefix`, the first positions are the prefix's, and only the rest is to be written.
        """
        if not self.can_admit_group(seqs, tokens, prefix):
            return False
        first, *others = seqs
        if prefix is None:
            self.admit(first, tokens)
        else:
            self.fork(prefix, first)
            self.grow(first.seq_id, tokens - self.length(prefix))
        for seq in others:
            self.fork(first.seq_id, seq)
        return True

    def can_readmit_group(self, seqs: Seq[Sequence], tokens: int, own: int, prefix: int | None = None) -> bool:
        """Whether a group that was preempted finds memory for its prompt and for `own` more positions of each member.

        They are grown in a later step, once the prompt is written again. A yes may turn out too early: then the group
        is preempted again. Where the group is alone in the pool the answer is yes.
        """
        return self.can_admit_group(seqs, tokens, prefix)

    def grow_group(self, seq_ids: Seq[int]) -> bool:
        """Give each of these sequences one more position: all of them, or none (and nothing has changed).

        Where `free_units` counts units, as many must be free as there are sequences (vLLM's rule).
        """
        if self.free_units is not None and self.free_units < len(seq_ids):
            return False
        return all(map(self.can_grow, seq_ids)) and self.grow_each(seq_ids) == len(seq_ids)

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence, all of whose positions have been written (beam search).

        False where memory lacks, and nothing has changed. Raises NotResidentError where the parent is not resident.
        """
        raise UserError(f"allocator={self.name} cannot fork a sequence")

    def reseat(self, moves: Seq[tuple[int, Sequence]]) -> bool:
        """Make resident sequences copies of others, (parent, child) each; what the children held goes (beam search).

        No child is a parent. False where memory lacks for a child; its sequences are to be given up then.
        """
        for _, child in moves:
            self.release(child.seq_id)
        return all(self.fork(parent_id, child) for parent_id, child in moves)

    def register_prefix(self, prefix_id: int, tokens: int) -> bool:
        """Keep memory for a prefix that requests begin with (section 4.4), resident as `prefix_id` until released.

        The caller writes it once. Raises UserError for a prefix that could never fit.
        """
        prefix = Sequence(prefix_id, tokens, 0)
        if tokens < 1 or not self.fits_pool(prefix):
            raise UserError(f"a prefix of {tokens} tokens does not fit {self.name}'s pool of {self.pool_bytes} bytes")
        return self.admit(prefix, tokens)

    # ---- a prefix cache: K/V that is found again by what it holds ------------------------------------------------
    #
    # `names` are hashes of the leading units of a prompt, each of which stands for all up to its end
    # (`prefix_cache.py`). Without a cache nothing is ever found.

    @property
    def cache_unit_tokens(self) -> int | None:
        """Tokens that one name stands for beyond the name before it; None where nothing can be found again."""
        return None

    def cached_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """How many leading tokens of a prompt of `tokens` would be found now; at most all but one."""
        return 0

    def can_admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> bool:
        """Whether `admit_cached` would succeed now."""
        return self.can_admit_group(seqs, tokens)

    def admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> int | None:
        """As `admit_group`, with what is found. Returns how many leading tokens need no prefill; None where refused."""
        return 0 if self.admit_group(seqs, tokens) else None

    def cache_blocks(self, seq_id: int, names: Seq[Hashable]) -> None:  # noqa: B027
        """Let what the sequence has written be found from now on, as far as there are names."""

    @property
    def shared_bytes(self) -> int:
        """What sharing saves: bytes that would be attached in addition if every sequence held its own."""
        return 0

    def _alone(self, seqs: Seq[Sequence], prefix: int | None = None) -> bool:
        if len(seqs) != 1 or prefix is not None:
            raise UserError(f"allocator={self.name} serves no groups of sequences")
        return True

    # ---- swapping ----------------------------------------------------------------------------------------------

    @property
    def can_swap(self) -> bool:
        """Whether the policy has a CPU pool; without one the methods below are not called."""
        return False

    def can_swap_out_group(self, seq_ids: Seq[int]) -> bool:
        """Whether the CPU pool has room for all that these sequences own."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def swap_out_group(self, seq_ids: Seq[int]) -> None:
        """Move a group to the CPU pool, what its members share once; none is resident any more.

        The copies come out of `drain`.
        """
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def can_swap_in_group(self, seq_ids: Seq[int]) -> bool:
        """Whether the group fits back, one position more for each included, with the watermark left."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def swap_in_group(self, seq_ids: Seq[int]) -> None:
        """Move a group back from the CPU pool; what its members shared they share again."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def can_swap_out(self, seq_id: int) -> bool:
        """As `can_swap_out_group`, for a sequence alone."""
        return self.can_swap_out_group([seq_id])

    def swap_out(self, seq_id: int) -> None:
        """As `swap_out_group`, for a sequence alone."""
        self.swap_out_group([seq_id])

    def can_swap_in(self, seq_id: int) -> bool:
        """As `can_swap_in_group`, for a sequence alone."""
        return self.can_swap_in_group([seq_id])

    def swap_in(self, seq_id: int) -> None:
        """As `swap_in_group`, for a sequence alone."""
        self.swap_in_group([seq_id])

    def look_ahead(self) -> list[Action]:
        """Plan, after scheduling, what the next iteration will need: actions for the background."""
        return []

    def drain(self) -> list[Action]:
        """Hand over, once, the actions decided since the last call: they precede this step's forward pass."""
        return []

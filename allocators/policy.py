"""The contract of an allocation policy: who owns which slot, block or page-group. Pure bookkeeping, no bytes.

A policy is deterministic and imports no torch: the same object decides in a measured and in a modelled run. What has
to be done to real memory it says as *actions* (`actions.py`), which a store performs or a device model prices.

    sequences one by one           `sequence_policy.py`: the nine methods that every policy must have
    groups, forks, prefixes        below; a policy without them refuses, or serves groups of one
    a prefix cache                 below; without one nothing is ever found
    a CPU pool to swap to          below; without one `can_swap` is False
"""

from collections.abc import Hashable
from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action, CopyBlock, CopyRow, Map, SwapIn, SwapOut, Unmap
from kvarena.allocators.sequence_policy import IntegrityError, NotResidentError, Sequence, SequencePolicy
from kvarena.errors import UserError

__all__ = ["Action", "CopyBlock", "CopyRow", "IntegrityError", "Map", "NotResidentError", "Policy", "Sequence",
           "SwapIn", "SwapOut", "Unmap"]  # fmt: skip


class Policy(SequencePolicy):
    """Who owns which bytes of one pool, and what sequences share of them."""

    # ---- groups: sequences of one request, which share its prompt -----------------------------------------------
    #
    # A prompt is written once, through the first member. Where members cannot share memory, the others get copies of
    # it, due as soon as one of them grows (or the first is released), by when it has been written.

    def group_fits_pool(self, seqs: Seq[Sequence], kept: Seq[Sequence] = (), prefix: int | None = None) -> bool:
        """Whether the group could ever run to its end, its members drifting apart, alone beside the `kept` prefixes.

        They are those that are registered, in that order. One of them may be the group's own `prefix`, which it shares.
        """
        if kept:
            raise UserError(f"allocator={self.name} keeps no prefixes")
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

    @property
    def shared_bytes(self) -> int:
        """What sharing saves: bytes that would be attached in addition if every sequence held its own."""
        return 0

    def _alone(self, seqs: Seq[Sequence], prefix: int | None = None) -> bool:
        if len(seqs) != 1 or prefix is not None:
            raise UserError(f"allocator={self.name} serves no groups of sequences")
        return True

    # ---- a prefix cache: K/V that is found again by what it holds ------------------------------------------------
    #
    # `names` are hashes of the leading units of a prompt, each of which stands for all up to its end
    # (`paged/prefix_cache.py`). Without a cache nothing is ever found.

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

    def cache_blocks(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let what the sequence has written be found from now on, as far as there are names."""

    # ---- swapping to a CPU pool --------------------------------------------------------------------------------

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

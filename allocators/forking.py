"""Gangs, beams and kept prefixes of a policy that can fork a sequence (PagedAttention section 4.4)."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from kvarena.allocators.policy import Admission, Policy, Sequence
from kvarena.errors import UserError

Fork = Callable[[int, Sequence], bool]  # (parent, child), as `Sharing.fork` has it


class Forking:
    """The `Sharing` of a policy, from its `fork`: every sequence of a gang is a fork of the first."""

    def __init__(self, policy: Policy, fork: Fork) -> None:
        self._policy = policy
        self._fork = fork
        self.prefixes: dict[int, Sequence] = {}  # that are kept, by id, in order

    @property
    def shared_bytes(self) -> int:
        """Nothing, where each has memory of its own."""
        return 0

    def admit(self, admission: Admission, begin: Callable[[Sequence, int], object]) -> int:
        """Give a gang memory; the policy knows that it suffices. Returns how much of it a kept prefix holds.

        `begin` gives a sequence its first positions.
        """
        gang, tokens, _, prefix, _ = admission
        held = 0
        if prefix is None:
            begin(gang[0], tokens)
        else:
            held = self._policy.length(prefix)
            self._fork(prefix, gang[0])
            self._policy.grow(gang[0].seq_id, tokens - held)
        for seq in gang[1:]:
            self._fork(gang[0].seq_id, seq)
        return held

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """One position for each, where all have room: nobody takes memory once it is admitted."""
        have_room = all([self._policy.tokens_until_growth(seq_id) > 0 for seq_id in seq_ids])
        return have_room and self._policy.grow_each(seq_ids) == len(seq_ids)

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence."""
        return self._fork(parent_id, child)

    def reseat(self, moves: Seq[tuple[int, Sequence]]) -> bool:
        """Release the children, and fork them again."""
        for _, child in moves:
            self._policy.release(child.seq_id)
        return all(self._fork(parent_id, child) for parent_id, child in moves)

    def keep_prefix(self, prefix_id: int, tokens: int) -> None:
        """Admit a prefix, and remember it. Refused where the pool has no room for it, beside those that are kept."""
        policy, prefix = self._policy, Sequence(prefix_id, tokens, 0)
        alone = Admission([prefix], tokens)
        if tokens < 1 or policy.refusal(alone) or policy.admit(alone) is None:
            pool = f"{policy.name}'s pool of {policy.pool_bytes} bytes"
            raise UserError(f"a prefix of {tokens} tokens does not fit {pool}, or not beside what is kept there")
        self.prefixes[prefix_id] = prefix

"""Copies that are owed to a sequence whose memory is its own, because what it copies has yet to be written.

    admit a group    the prompt is going to be written, once, in the memory of the first member
    ... a step ...   it is written
    a member grows   it is copied to that member, before the step in which the member first writes and reads
    the first goes   it is copied to whoever has not got it yet, before its memory is given to somebody else

What a parent writes after the fork lies behind what is owed, so its own growth changes nothing.
"""

from collections.abc import Callable, Iterable

from kvarena.allocators.actions import Action, CopyBlock, CopyRow
from kvarena.allocators.kv_layout import KVLayout


class PendingCopies:
    """Who owes whom how many positions. `copies(parent, child, tokens)` says how they are copied.

    Copies are appended to `actions`, the policy's list of what is to be done before this step's forward pass.
    """

    def __init__(self, copies: Callable[[int, int, int], Iterable[Action]]) -> None:
        self._copies = copies
        self._owed: dict[int, tuple[int, int]] = {}  # child -> parent, tokens
        self._children: dict[int, list[int]] = {}  # parent -> children it owes, and some that it owes no more
        self.active = False  # whether anything is owed, or has been copied since actions were handed over

    def is_owed(self, seq_id: int) -> bool:
        """Whether the sequence does not hold its first positions yet."""
        return seq_id in self._owed

    def owe(self, parent_id: int, child_id: int, tokens: int, actions: list[Action]) -> None:
        """Note that the child needs the parent's first positions. What the parent is owed itself comes first."""
        self.pay([parent_id], actions)
        if tokens:
            self.active = True
            self._owed[child_id] = (parent_id, tokens)
            self._children.setdefault(parent_id, []).append(child_id)

    def pay(self, child_ids: Iterable[int], actions: list[Action]) -> None:
        """Copy now what these sequences are owed, if anything."""
        if self._owed:
            for child_id in child_ids:
                if child_id in self._owed:
                    parent_id, tokens = self._owed.pop(child_id)
                    actions += self._copies(parent_id, child_id, tokens)
            if not self._owed:
                self._children.clear()

    def leave(self, seq_id: int, actions: list[Action]) -> None:
        """A sequence is about to go: it pays its debts, and is owed nothing any more."""
        self._owed.pop(seq_id, None)
        children = self._children.pop(seq_id, ())
        self.pay([child_id for child_id in children if self._owed.get(child_id, (None,))[0] == seq_id], actions)

    def without_copies_to(self, targets: Iterable[int], actions: list[Action]) -> list[Action]:
        """These actions but for the copies into rows (or blocks) that nobody will read, in this step or later."""
        if not self.active:
            return actions
        read = {action.source for action in actions if isinstance(action, CopyRow | CopyBlock)}
        gone = set(targets) - read
        return [a for a in actions if not (isinstance(a, CopyRow | CopyBlock) and a.target in gone)]

    def handed_over(self) -> None:
        """The actions so far are going to be performed."""
        self.active = bool(self._owed)


def row_copies(kv_layout: KVLayout, source: int, target: int, tokens: int) -> Iterable[CopyRow]:
    """Copies of the first `tokens` positions of a row; of a window only what is remembered of them."""
    for index, group in enumerate(kv_layout.groups):
        yield CopyRow(index, source, target, 0, group.resident_tokens(tokens) * group.token_bytes)

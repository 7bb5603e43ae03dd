"""Random programs of groups that are admitted, grow, fork, die, are swapped and end, on a policy and real memory.

Every position of every sequence has a tag of its own, written once into all elements of K and V. After every
operation the policy's books are recounted; after every step the memory of every sequence holds its tags, whatever was
shared, copied, aliased or moved, and mapped bytes are the policy's count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import Admission, Policy, Sequence, Sharing
from kvarena.kernels.layout import Layout

Choose = Callable[[int], int]  # a number from 0 up to, not including

MOST_MEMBERS = 4
LONGEST_PROMPT = 40
LONGEST_OUTPUT = 30


@dataclass
class Group:
    """Members by sequence id, in order."""

    prompt: int
    output: int
    members: list[int]
    fresh: bool = True  # its prompt is to be written in the step that is being decided


@dataclass
class Programs:
    """The groups of one policy and one store. `play` may be called again and again."""

    policy: Policy
    store: Store
    num_layers: int
    groups: list[Group] = field(default_factory=list)
    swapped: list[Group] = field(default_factory=list)
    tags: dict[int, list[int]] = field(default_factory=dict)  # by sequence: what its positions hold
    unwritten: dict[int, int] = field(default_factory=dict)  # sequence -> first position to be written in this step
    owed: set[int] = field(default_factory=set)  # members that have not grown: their prompt may not have arrived
    next_id: int = 0
    next_tag: int = 0

    @property
    def sharing(self) -> Sharing:
        """What the policy does with several sequences at once."""
        assert self.policy.sharing is not None
        return self.policy.sharing

    def play(self, choose: Choose, length: int) -> None:
        """Do so many operations, then end everything; nothing is left in the pool."""
        operations = (
            self.admit, self.grow, self.grow, self.beam, self.reseat,
            self.finish, self.preempt, self.return_, self.step,
        )  # fmt: skip
        for _ in range(length):
            operations[choose(len(operations))](choose)
            self.policy.check_integrity()
        self.step(choose)
        for group in [*self.groups, *self.swapped]:
            self.end(group.members)
        self.groups, self.swapped = [], []
        self.step(choose)
        assert self.policy.usage().live == 0
        assert self.sharing.shared_bytes == 0

    # ---- operations --------------------------------------------------------------------------------------------

    def admit(self, choose: Choose) -> None:
        """A group of one to four comes."""
        prompt, output = 1 + choose(LONGEST_PROMPT), choose(LONGEST_OUTPUT)
        members = [self.next_id + i for i in range(1 + choose(MOST_MEMBERS))]
        asked = Admission([Sequence(seq_id, prompt, output) for seq_id in members], prompt)
        expected, before = self.policy.can_admit(asked), self.policy.usage()
        assert self.policy.admit(asked) == (0 if expected else None)
        if not expected:
            assert self.policy.usage() == before
            assert self.groups or self.swapped or self.policy.refusal(asked)
            return
        self.next_id += len(members)
        self.groups.append(Group(prompt, output, members))
        tags = self.new_tags(prompt)
        self.tags |= {seq_id: tags.copy() for seq_id in members}
        self.unwritten[members[0]] = 0
        self.owed |= set(members[1:])

    def grow(self, choose: Choose) -> None:
        """A group decodes: one position for each member, or nothing has changed."""
        group = self.written_group(choose)
        if group is None or len(self.tags[group.members[0]]) >= group.prompt + group.output:
            return
        before = self.policy.usage()
        if not self.sharing.grow_gang(group.members):
            assert self.policy.usage() == before
            return
        for seq_id in group.members:
            self.unwritten.setdefault(seq_id, len(self.tags[seq_id]))
            self.tags[seq_id] += self.new_tags(1)
            self.owed.discard(seq_id)

    def beam(self, choose: Choose) -> None:
        """Members die, survivors are forked into their places; where memory lacks, the group is preempted."""
        group = self.written_group(choose)
        if group is None or len(group.members) < 2 or self.unwritten.keys() & set(group.members):
            return
        parents = [group.members[choose(len(group.members))] for _ in group.members]
        dead = [seq_id for seq_id in group.members if seq_id not in parents]
        survivors = [seq_id for seq_id in group.members if seq_id in parents]
        self.end(dead)
        group.members = survivors
        for parent in survivors:
            for _ in range(parents.count(parent) - 1):
                if not self.fork(parent, group):
                    self.end(group.members)
                    self.groups.remove(group)
                    return

    def fork(self, parent: int, group: Group) -> bool:
        """One more member, a copy of another."""
        child, before = Sequence(self.next_id, group.prompt, group.output), self.policy.usage()
        if not self.sharing.fork(parent, child):
            assert self.policy.usage() == before
            return False
        self.next_id += 1
        group.members.append(child.seq_id)
        self.tags[child.seq_id] = self.tags[parent].copy()
        self.owed.add(child.seq_id)
        return True

    def reseat(self, choose: Choose) -> None:
        """Some members become copies of others. Memory never lacks for that: each gives up what it had."""
        group = self.written_group(choose)
        if group is None or len(group.members) < 2 or self.unwritten.keys() & set(group.members):
            return
        parents = [group.members[choose(len(group.members))] for _ in group.members]
        pairs = zip(parents, group.members, strict=True)
        moves = [(parent, Sequence(seat, group.prompt, group.output)) for parent, seat in pairs if seat not in parents]
        assert self.sharing.reseat(moves)
        for parent, child in moves:
            self.tags[child.seq_id] = self.tags[parent].copy()
            self.owed.add(child.seq_id)

    def finish(self, choose: Choose) -> None:
        """One member ends before the others, or with the last of them the group."""
        group = self.written_group(choose)
        if group is not None:
            self.end([group.members.pop(choose(len(group.members)))])
            if not group.members:
                self.groups.remove(group)

    def preempt(self, choose: Choose) -> None:
        """A group goes as a whole: to the CPU pool where there is one with room, else for good."""
        group = self.written_group(choose)
        if group is None or self.unwritten.keys() & set(group.members):
            return
        self.groups.remove(group)
        if (pool := self.policy.swapping) and pool.can_swap_out(group.members):
            pool.swap_out(group.members)
            self.swapped.append(group)
        else:
            self.end(group.members)

    def return_(self, choose: Choose) -> None:
        """A group comes back from the CPU pool, if it fits."""
        if self.swapped and (pool := self.policy.swapping):
            group = self.swapped[choose(len(self.swapped))]
            if pool.can_swap_in(group.members):
                pool.swap_in(group.members)
                self.swapped.remove(group)
                self.groups.append(group)

    # ---- steps -------------------------------------------------------------------------------------------------

    def step(self, choose: Choose) -> None:
        """What was decided is done: actions, then the writes of a forward pass. Then everything is where it should."""
        self.store.apply(self.policy.drain())
        self.store.apply_in_background(self.policy.look_ahead())
        for seq_id, first in self.unwritten.items():
            self.write(seq_id, first)
        self.unwritten.clear()
        for group in self.groups:
            group.fresh = False
            for seq_id in group.members:
                assert self.policy.length(seq_id) == len(self.tags[seq_id])
                if seq_id not in self.owed:
                    self.check(seq_id)
        if (mapped := getattr(self.policy, "mapped_bytes", None)) is not None:
            assert self.store.physical().mapped_bytes == mapped

    def write(self, seq_id: int, first: int) -> None:
        """Write a sequence's tags from position `first` on."""
        for index, k_and_v in enumerate(self.memory(seq_id)):
            tags = torch.tensor(self.tags[seq_id][first:], dtype=torch.float32, device=k_and_v[1].device)
            k_and_v[1][k_and_v[0][first:]] = (tags + index)[:, None, None]

    def check(self, seq_id: int) -> None:
        """Every position holds its tag, in every element of K and V of every layer."""
        tags = torch.tensor(self.tags[seq_id], dtype=torch.float32)
        for index, (positions, tensor) in enumerate(self.memory(seq_id)):
            held = tensor[positions].cpu()
            assert (held == (tags + index)[:, None, None]).all(), (seq_id, index, held[:, 0, 0], tags + index)

    def memory(self, seq_id: int) -> list[tuple[Tensor, Tensor]]:
        """Of K and V of each layer: index of each position of the sequence, and the tensor, [positions, H, D]."""
        length = len(self.tags[seq_id])
        view = self.store.view([seq_id], [length], [1])
        found = []
        for layer in range(self.num_layers):
            cache = self.store.layer(layer)
            for tensor in (cache.k, cache.v):
                if cache.layout is Layout.CONTIGUOUS:
                    assert view.rows is not None
                    found.append((torch.arange(length), tensor[int(view.rows[0])]))
                else:
                    assert view.block_table is not None
                    size = cache.block_size
                    slots = (view.block_table[0].long()[:, None] * size + torch.arange(size)).flatten()[:length]
                    found.append((slots, tensor.view(-1, *tensor.shape[2:])))
        return found

    # ---- helpers -----------------------------------------------------------------------------------------------

    def new_tags(self, count: int) -> list[int]:
        """Tags that no position has had so far; float32 holds them exactly for long enough."""
        self.next_tag = (self.next_tag + count) % (1 << 22)
        return list(range(self.next_tag, self.next_tag + count))

    def written_group(self, choose: Choose) -> Group | None:
        """A resident group whose prompt has been written."""
        groups = [group for group in self.groups if not group.fresh]
        return groups[choose(len(groups))] if groups else None

    def end(self, members: list[int]) -> None:
        """Release sequences, resident or swapped out."""
        for seq_id in members:
            self.policy.release(seq_id)
            del self.tags[seq_id]
            self.unwritten.pop(seq_id, None)
            self.owed.discard(seq_id)

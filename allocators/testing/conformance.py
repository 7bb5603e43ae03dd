"""What every policy must keep: its books, its word (`can_*`), and its hands off when it says no.

`check_policy` drives a policy through random programs - sequences come, grow, are swapped and go in any order - and
holds it after every step to a model that only counts tokens. It serves the tests of our policies and whoever writes
one of their own (notebooks/your_own_allocator.ipynb). It needs hypothesis, which `./run.sh test` installs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Admission, Policy, Sequence
from kvarena.allocators.usage import Usage

MAX_TOKENS = 64  # of a sequence, in every program
ODD_BYTES = 3  # of a pool that form no whole unit

PolicyMaker = Callable[[KVLayout, int, int], Policy]  # (KV layout, bytes of the pool, tokens of the longest sequence)


@dataclass(frozen=True)
class Traits:
    """Where policies may rightly differ."""

    forks: bool = False  # `fork` is served, and shared memory counts once
    pads: bool = False  # rows of a batch grow past their final length, together
    rings: bool = False  # layers with a window keep a ring of it, and not every position


PLAIN = Traits()


def check_policy(
    make: PolicyMaker,
    kv_layout: KVLayout,
    *,
    traits: Traits = PLAIN,
    programs: int = 40,
    steps: int = 30,
    shorten: bool = True,
) -> None:
    """Run random programs of at most `steps` steps. Raises AssertionError with the shortest one that goes wrong.

    To `shorten` it may take minutes.
    """
    machine = type("Program", (Residents,), {"make": staticmethod(make), "layout": kv_layout, "traits": traits})
    limits = settings(
        max_examples=programs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=tuple(Phase) if shorten else (Phase.generate,),
    )
    run_state_machine_as_test(machine, settings=limits)


def books(policy: Policy, lengths: dict[int, int]) -> tuple[object, ...]:
    """What a refusal must not change."""
    return policy.usage(), {seq_id: policy.length(seq_id) for seq_id in lengths}


def added(left: Usage, right: Usage) -> Usage:
    """Leaf by leaf."""
    return Usage(*map(sum, zip(left, right, strict=True)))


class Residents(RuleBasedStateMachine):
    """Sequences come, grow and go in any order; `self.seqs` and `self.lengths` are the model."""

    make: ClassVar[PolicyMaker]
    layout: ClassVar[KVLayout]
    traits: ClassVar[Traits]

    @initialize(pool_tokens=st.integers(70, 400))
    def start(self, pool_tokens: int) -> None:
        """Begin with an empty pool."""
        pool_bytes = pool_tokens * self.layout.token_bytes + ODD_BYTES
        self.policy = type(self).make(self.layout, pool_bytes, MAX_TOKENS)
        self.seqs: dict[int, Sequence] = {}
        self.lengths: dict[int, int] = {}
        self.swapped: dict[int, int] = {}
        self.parents: set[int] = set()
        self.next_id = 0

    def pick(self, index: int) -> int:
        """One of the resident sequences."""
        return list(self.lengths)[index % len(self.lengths)]

    @rule(prompt=st.integers(1, 40), output=st.integers(1, 24), computed=st.integers(0, 10))
    def admit(self, prompt: int, output: int, computed: int) -> None:
        """A sequence comes, or returns to be recomputed; where it is refused, nothing has changed."""
        seq = Sequence(self.next_id, prompt, output)
        tokens = min(prompt + computed, seq.final_tokens)  # a recomputed request returns with its output
        asked = Admission([seq], tokens)
        before, expected = books(self.policy, self.lengths), self.policy.can_admit(asked)
        found = self.policy.admit(asked)
        assert found == (0 if expected else None)
        if expected:
            self.seqs[seq.seq_id], self.lengths[seq.seq_id] = seq, tokens
            self.next_id += 1
        else:
            assert books(self.policy, self.lengths) == before
            assert self.lengths or self.swapped or self.policy.refusal(asked)

    @precondition(lambda self: self.lengths)
    @rule(index=st.integers(0, 9), tokens=st.integers(1, 30))
    def grow(self, index: int, tokens: int) -> None:
        """A sequence grows by many positions at once, or nothing has changed."""
        seq_id = self.pick(index)
        assume(self.lengths[seq_id] + tokens <= MAX_TOKENS)
        before = books(self.policy, self.lengths)
        if self.policy.grow(seq_id, tokens):
            self.lengths[seq_id] += tokens
        else:
            assert books(self.policy, self.lengths) == before

    @precondition(lambda self: self.lengths)
    @rule(index=st.integers(0, 9))
    def grow_within_what_it_owns(self, index: int) -> None:
        """`tokens_until_growth` more positions fit, and take nothing from the pool."""
        seq_id = self.pick(index)
        tokens = min(self.policy.tokens_until_growth(seq_id), MAX_TOKENS - self.lengths[seq_id])
        before = self.policy.usage()
        assert self.policy.grow(seq_id, tokens)
        self.lengths[seq_id] += tokens
        after = self.policy.usage()
        assert (after.free, after.stranded, after.remainder) == (before.free, before.stranded, before.remainder)

    @precondition(lambda self: self.lengths)
    @rule()
    def grow_each(self) -> None:
        """One position each, in order, up to the first that finds no memory, as asking one by one; or up to the first
        that finds nothing free, whether it needs it or not.
        """
        ids = [seq_id for seq_id, length in self.lengths.items() if length < MAX_TOKENS]
        walked = copy.deepcopy(self.policy)
        grown = self.policy.grow_each(ids)
        assert all(walked.grow(seq_id) for seq_id in ids[:grown])
        assert books(self.policy, self.lengths) == books(walked, self.lengths)
        usage = walked.usage()
        assert grown == len(ids) or usage.free + usage.cached == 0 or not walked.grow(ids[grown])
        for seq_id in ids[:grown]:
            self.lengths[seq_id] += 1

    @precondition(lambda self: self.lengths)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        """A sequence ends, or is preempted."""
        seq_id = self.pick(index)
        self.policy.release(seq_id)
        self.forget(seq_id)

    def forget(self, seq_id: int) -> None:
        """Strike a sequence from the model."""
        del self.lengths[seq_id], self.seqs[seq_id]
        self.parents.discard(seq_id)

    @precondition(lambda self: self.lengths)
    @rule(limit=st.integers(1, 40))
    def advance(self, limit: int) -> None:
        """A jump over quiet steps is the same as walking them, in lengths and in the sum of every leaf."""
        ids = list(self.lengths)
        left = [self.seqs[i].final_tokens - self.lengths[i] for i in ids if not self.traits.pads]
        limit = min([limit, *left])  # a request that ends ends the stretch; padded rows go on
        self.policy.drain()
        steps = self.policy.quiet_steps(ids, limit) if limit > 0 else 0
        assert 0 <= steps <= max(limit, 0)
        if steps == 0:
            return
        walked, total = copy.deepcopy(self.policy), Usage()
        for _ in range(steps):
            assert walked.grow_each(ids) == len(ids)
            assert not walked.drain()
            total = added(total, walked.usage())
        walked.check_integrity()
        assert self.policy.advance(ids, steps) == total
        assert self.policy.usage() == walked.usage()
        for seq_id in ids:
            self.lengths[seq_id] += steps

    @precondition(lambda self: self.traits.forks and self.lengths)
    @rule(index=st.integers(0, 9), output=st.integers(0, 24))
    def fork(self, index: int, output: int) -> None:
        """A copy of a resident sequence comes."""
        parent = self.pick(index)
        child = Sequence(self.next_id, self.lengths[parent], min(output, MAX_TOKENS - self.lengths[parent]))
        assert self.policy.sharing is not None
        assert self.policy.sharing.fork(parent, child)
        self.seqs[self.next_id], self.lengths[self.next_id] = child, self.lengths[parent]
        self.parents |= {parent, self.next_id}
        self.next_id += 1

    @precondition(lambda self: self.policy.swapping and self.lengths)
    @rule(index=st.integers(0, 9))
    def swap_out(self, index: int) -> None:
        """A sequence leaves for the CPU pool, if there is room."""
        seq_id, pool = self.pick(index), self.policy.swapping
        if pool and pool.can_swap_out([seq_id]):
            pool.swap_out([seq_id])
            self.swapped[seq_id] = self.lengths[seq_id]
            self.lengths.pop(seq_id)

    @precondition(lambda self: self.swapped)
    @rule(index=st.integers(0, 9), abort=st.booleans())
    def swap_in(self, index: int, abort: bool) -> None:
        """It comes back and can grow, or ends there."""
        seq_id, pool = list(self.swapped)[index % len(self.swapped)], self.policy.swapping
        if abort:
            self.policy.release(seq_id)
            del self.swapped[seq_id], self.seqs[seq_id]
        elif pool and pool.can_swap_in([seq_id]):
            pool.swap_in([seq_id])
            self.lengths[seq_id] = self.swapped.pop(seq_id)
            assert copy.deepcopy(self.policy).grow(seq_id)

    @rule()
    def act(self) -> None:
        """A step is over: what was decided is done."""
        self.policy.look_ahead()
        self.policy.drain()

    @invariant()
    def books_are_right(self) -> None:
        """Every byte is in one leaf, and every length is what the model says."""
        self.policy.check_integrity()
        usage = self.policy.usage(Sequence(-1, 30, 30))
        assert usage.pool == self.policy.pool_bytes
        assert min(usage) >= 0
        assert usage.deferred + usage.surplus + usage.premapped == usage.retained
        assert {seq_id: self.policy.length(seq_id) for seq_id in self.lengths} == self.lengths

    @invariant()
    def live_is_what_was_written(self) -> None:
        """The live leaf is the K/V of the lengths."""
        if self.parents:
            return  # shared memory counts once: `check_integrity` recounts it
        layout, lengths = self.policy.kv_layout, dict(self.lengths)
        if self.traits.pads:  # what is written past the final length is padding
            lengths = {i: min(length, self.seqs[i].final_tokens) for i, length in lengths.items()}
        written = [layout.resident_bytes(n) if self.traits.rings else n * layout.token_bytes for n in lengths.values()]
        assert self.policy.usage().live == sum(written)

    def teardown(self) -> None:
        """Nothing leaks: with everyone gone the pool is free or can be taken back."""
        if not hasattr(self, "policy"):
            return
        for seq_id in [*self.lengths, *self.swapped]:
            self.policy.release(seq_id)
        self.policy.check_integrity()
        usage = self.policy.usage()
        assert usage.free + usage.retained + usage.remainder == self.policy.pool_bytes
        largest = Admission([Sequence(-1, 40, 24)], 40)
        assert self.policy.can_admit(largest) == (not self.policy.refusal(largest))

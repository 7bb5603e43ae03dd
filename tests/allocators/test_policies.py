"""What every policy must keep: its books, its word (`can_*`), and its hands off when it says no."""

import copy
from typing import ClassVar

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarena.allocators.kv_layout import KVLayout, attention_layout, latent_layout, sliding_layout
from kvarena.allocators.policy import Policy, Sequence
from kvarena.allocators.registry import ALLOCATORS, config_class, make_policy
from kvarena.allocators.usage import Usage

MAX_TOKENS = 64
LAYOUTS = {
    "MHA": attention_layout(2, 4, 8),
    "GQA": attention_layout(2, 1, 8, "bfloat16"),
    "FP8 GQA": attention_layout(2, 1, 8, "float8"),
    "MLA": latent_layout(3, 18),
    "sliding + full": sliding_layout(1, 3, 24, 1, 8),
}
OPTIONS = {
    "orca_max": {"estimate": "max", "block_size": 4},
    "orca_pow2": {"estimate": "pow2", "block_size": 4},
    "orca_oracle": {"estimate": "oracle", "block_size": 4},
    "paged": {"block_size": 4, "swap_bytes": 4096},
    "paged_reserved": {"block_size": 4},
    "fastertransformer": {"batch_size": 3, "max_padded_tokens": 60},
    "vattention": {"page_group": "64KB", "max_rows": 6},
}


def policy_of(name: str, layout: KVLayout, pool_tokens: int) -> Policy:
    """A policy with a pool of so many tokens and an odd rest; vattention's page-groups call for fatter tokens."""
    if name == "vattention":
        layout = KVLayout(tuple(_fatter(group) for group in layout.groups))
    config = config_class(name)(name=name, **OPTIONS.get(name, {}))
    return make_policy(config, layout, pool_tokens * layout.token_bytes + 3, MAX_TOKENS)


def _fatter(group):
    return type(group)(
        group.kind, group.num_layers, group.tensors_per_layer, group.token_bytes * 512, group.dtype, group.window
    )


def books(policy: Policy, lengths: dict[int, int]) -> tuple[object, ...]:
    """What a refusal must not change."""
    return policy.usage(), policy.free_units, {seq_id: policy.length(seq_id) for seq_id in lengths}


def added(left: Usage, right: Usage) -> Usage:
    return Usage(*map(sum, zip(left, right, strict=True)))


class Residents(RuleBasedStateMachine):
    """Sequences come, grow and go in any order; `self.seqs` and `self.lengths` are the model."""

    name: ClassVar[str]
    layout: ClassVar[KVLayout]

    @initialize(pool_tokens=st.integers(70, 400))
    def start(self, pool_tokens: int) -> None:
        self.policy = policy_of(self.name, self.layout, pool_tokens)
        self.seqs: dict[int, Sequence] = {}
        self.lengths: dict[int, int] = {}
        self.swapped: dict[int, int] = {}
        self.parents: set[int] = set()
        self.next_id = 0

    def pick(self, index: int) -> int:
        return list(self.lengths)[index % len(self.lengths)]

    @rule(prompt=st.integers(1, 40), output=st.integers(1, 24), computed=st.integers(0, 10))
    def admit(self, prompt: int, output: int, computed: int) -> None:
        seq = Sequence(self.next_id, prompt, output)
        tokens = min(prompt + computed, seq.final_tokens)  # a recomputed request returns with its output
        before, expected = books(self.policy, self.lengths), self.policy.can_admit(seq, tokens)
        admitted = self.policy.admit(seq, tokens)
        assert admitted == expected
        if admitted:
            self.seqs[seq.seq_id], self.lengths[seq.seq_id] = seq, tokens
            self.next_id += 1
        else:
            assert books(self.policy, self.lengths) == before
            assert self.lengths or self.swapped or not self.policy.fits_pool(seq)

    @precondition(lambda self: self.lengths)
    @rule(index=st.integers(0, 9), tokens=st.integers(1, 30))
    def grow(self, index: int, tokens: int) -> None:
        seq_id = self.pick(index)
        assume(self.lengths[seq_id] + tokens <= MAX_TOKENS)
        before, expected = books(self.policy, self.lengths), self.policy.can_grow(seq_id, tokens)
        grown = self.policy.grow(seq_id, tokens)
        assert grown == expected
        if grown:
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
        """One position each, in order, up to the first that finds no memory: as asking one by one, a unit free."""
        ids = [seq_id for seq_id, length in self.lengths.items() if length < MAX_TOKENS]
        walked = copy.deepcopy(self.policy)
        grown = 0
        while grown < len(ids) and walked.free_units != 0 and walked.grow(ids[grown]):
            grown += 1
        assert self.policy.grow_each(ids) == grown
        assert books(self.policy, self.lengths) == books(walked, self.lengths)
        for seq_id in ids[:grown]:
            self.lengths[seq_id] += 1

    @precondition(lambda self: self.lengths)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        seq_id = self.pick(index)
        self.policy.release(seq_id)
        self.forget(seq_id)

    def forget(self, seq_id: int) -> None:
        del self.lengths[seq_id], self.seqs[seq_id]
        self.parents.discard(seq_id)

    @precondition(lambda self: self.lengths)
    @rule(limit=st.integers(1, 40))
    def advance(self, limit: int) -> None:
        """A jump over quiet steps is the same as walking them, in lengths and in the sum of every leaf."""
        ids = list(self.lengths)
        left = [self.seqs[i].final_tokens - self.lengths[i] for i in ids if self.name != "fastertransformer"]
        limit = min([limit, *left])  # a request that ends ends the stretch; padded rows go on
        self.policy.drain()
        steps = self.policy.quiet_steps(ids, limit) if limit > 0 else 0
        assert 0 <= steps <= max(limit, 0)
        if steps == 0:
            return
        walked, total = copy.deepcopy(self.policy), Usage()
        for _ in range(steps):
            assert all(walked.grow(seq_id) for seq_id in ids)
            assert not walked.drain()
            assert walked.free_units != 0
            total = added(total, walked.usage())
        walked.check_integrity()
        assert self.policy.advance(ids, steps) == total
        assert self.policy.usage() == walked.usage()
        for seq_id in ids:
            self.lengths[seq_id] += steps

    @precondition(lambda self: self.name == "paged" and self.lengths)
    @rule(index=st.integers(0, 9), output=st.integers(0, 24))
    def fork(self, index: int, output: int) -> None:
        parent = self.pick(index)
        child = Sequence(self.next_id, self.lengths[parent], output)
        assert self.policy.fork(parent, child)
        self.seqs[self.next_id], self.lengths[self.next_id] = child, self.lengths[parent]
        self.parents |= {parent, self.next_id}
        self.next_id += 1

    @precondition(lambda self: self.policy.can_swap and self.lengths)
    @rule(index=st.integers(0, 9))
    def swap_out(self, index: int) -> None:
        seq_id = self.pick(index)
        if self.policy.can_swap_out(seq_id):
            self.policy.swap_out(seq_id)
            self.swapped[seq_id] = self.lengths[seq_id]
            self.lengths.pop(seq_id)

    @precondition(lambda self: self.swapped)
    @rule(index=st.integers(0, 9), abort=st.booleans())
    def swap_in(self, index: int, abort: bool) -> None:
        seq_id = list(self.swapped)[index % len(self.swapped)]
        if abort:
            self.policy.release(seq_id)
            del self.swapped[seq_id], self.seqs[seq_id]
        elif self.policy.can_swap_in(seq_id):
            self.policy.swap_in(seq_id)
            self.lengths[seq_id] = self.swapped.pop(seq_id)
            assert self.policy.can_grow(seq_id)

    @rule()
    def act(self) -> None:
        """A step is over: what was decided is done."""
        self.policy.look_ahead()
        self.policy.drain()

    @invariant()
    def books_are_right(self) -> None:
        self.policy.check_integrity()
        usage = self.policy.usage(Sequence(-1, 30, 30))
        assert usage.pool == self.policy.pool_bytes
        assert min(usage) >= 0
        assert usage.deferred + usage.surplus + usage.premapped == usage.retained
        assert {seq_id: self.policy.length(seq_id) for seq_id in self.lengths} == self.lengths

    @invariant()
    def live_is_what_was_written(self) -> None:
        if self.parents:
            return  # shared blocks count once; test_paged.py counts them
        layout, lengths = self.policy.kv_layout, dict(self.lengths)
        if self.name == "fastertransformer":  # what is written past the final length is padding
            lengths = {i: min(length, self.seqs[i].final_tokens) for i, length in lengths.items()}
        rings = self.name in ("static", "fastertransformer", "vattention")
        written = [layout.resident_bytes(n) if rings else n * layout.token_bytes for n in lengths.values()]
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
        largest = Sequence(-1, 40, 24)
        assert self.policy.can_admit(largest, 40) == self.policy.fits_pool(largest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_random_programs(name: str, layout: str) -> None:
    machine = type("Machine", (Residents,), {"name": name, "layout": LAYOUTS[layout]})
    examples = 6 if layout != "MHA" else 150 if name == "paged" else 40  # paged also forks and swaps
    case = machine.TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=30, deadline=None)
    case("runTest").debug()

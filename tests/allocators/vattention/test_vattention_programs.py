"""Random programs against vAttention's promises about actions: performed one by one, they always make sense."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarena.allocators.kv_layout import attention_layout, latent_layout, sliding_layout
from kvarena.allocators.policy import Action, Admission, Map, Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

MAX_TOKENS = 600
LAYOUTS = (
    attention_layout(2, 4, 128, "float32"),  # 32 tokens a page-group
    attention_layout(3, 3, 120, "float16"),  # a token straddles
    sliding_layout(2, 3, 100, 4, 128),  # two layer groups, of 4 and 6 tensors
    latent_layout(3, 576),
)
SWITCHES = st.fixed_dictionaries(
    {
        "overlap": st.booleans(),
        "deferred_reclamation": st.booleans(),
        "eager_allocation": st.booleans(),
        "eager_groups": st.integers(1, 3),
        "reclaim_threshold": st.sampled_from([0.0, 0.1, 0.4]),
        "tensor_slicing": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.05]),
    }
)


class Programs(RuleBasedStateMachine):
    """`self.memory` is what a store would have mapped: (layer group, row, ordinal) -> page-group."""

    @initialize(layout=st.sampled_from(LAYOUTS), groups=st.integers(30, 150), rows=st.integers(1, 6), switches=SWITCHES)
    def start(self, layout, groups, rows, switches) -> None:
        self.policy = VAttentionPolicy(
            VAttentionConfig(max_rows=rows, page_group="64KB", **switches),
            layout,
            groups * 64 * KB + 77,
            max_tokens=MAX_TOKENS,
        )
        self.memory: dict[tuple[int, int, int], int] = {}
        self.ids: list[int] = []
        self.next_id = 0

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            where, page_group = (action.group, action.row, action.ordinal), action.page_group
            if isinstance(action, Map):
                assert where not in self.memory
                assert page_group not in self.mapped(action.group)
                assert action.ordinal == 0 or (*where[:2], action.ordinal - 1) in self.memory  # rows have no holes
                self.memory[where] = page_group
            else:
                assert self.memory.pop(where) == page_group

    def mapped(self, group: int) -> set[int]:
        return {page_group for where, page_group in self.memory.items() if where[0] == group}

    @rule(prompt=st.integers(1, 300), output=st.integers(0, 300))
    def admit(self, prompt: int, output: int) -> None:
        if self.policy.admit(Admission([Sequence(self.next_id, prompt, output)], prompt)) is not None:
            self.ids.append(self.next_id)
        self.next_id += 1

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 5), tokens=st.integers(1, 120))
    def grow(self, index: int, tokens: int) -> None:
        seq_id = self.ids[index % len(self.ids)]
        fits, pending = tokens <= self.policy.tokens_until_growth(seq_id), len(self.policy._actions)
        assert self.policy.grow(seq_id, tokens) or not fits
        assert not fits or len(self.policy._actions) == pending

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 5))
    def release(self, index: int) -> None:
        self.policy.release(self.ids.pop(index % len(self.ids)))

    @rule()
    def look_ahead_plans_everything_at_once(self) -> None:
        self.perform(self.policy.drain())
        self.perform(self.policy.look_ahead())
        assert self.policy.look_ahead() == []

    @precondition(lambda self: self.ids)
    @rule(limit=st.integers(1, 90))
    def quiet_steps_are_quiet(self, limit: int) -> None:
        self.look_ahead_plans_everything_at_once()
        for _ in range(self.policy.quiet_steps(self.ids, limit)):
            assert all(self.policy.grow(seq_id) for seq_id in self.ids)
            assert self.policy.drain() == []
            assert self.policy.look_ahead() == []

    @precondition(lambda self: self.policy.overlap)
    @rule()
    def overlap_maps_ahead_for_all_if_all_fit(self) -> None:
        self.look_ahead_plans_everything_at_once()
        ahead = [min(self.policy.length(seq_id) + 1, MAX_TOKENS) for seq_id in self.ids]
        needed = sum(g.num_tensors * g.page_groups_for(length) for g in self.policy.geometries for length in ahead)
        if needed <= self.policy.pool_bytes // (64 * KB):
            for seq_id, length in zip(self.ids, ahead, strict=True):
                assert self.policy.tokens_until_growth(seq_id) >= length - self.policy.length(seq_id)

    @invariant()
    def the_books_are_right(self) -> None:
        self.policy.check_integrity()

    @invariant()
    def what_is_mapped_is_what_the_policy_counts(self) -> None:
        if not self.policy._actions:
            tensors = [g.num_tensors for g in self.policy.geometries]
            mapped = sum(tensors[group] for group, _, _ in self.memory)
            assert mapped * self.policy.page_group_bytes == self.policy.mapped_bytes


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

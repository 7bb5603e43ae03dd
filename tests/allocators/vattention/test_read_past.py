"""vAttention's rows where a kernel reads on past a sequence's end: what it touches there is mapped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.registry import config_class
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.harness.run.systems import System, with_room_to_read
from kvarena.kernels.config import KernelConfig

LAYOUT = attention_layout(2, 2, 64, "float32")  # 512 bytes a token in a tensor: a page-group of 64 KB holds 128
PAST = 50


def policy_of(**options) -> VAttentionPolicy:
    return VAttentionPolicy(VAttentionConfig(page_group="64KB", max_rows=4, **options), LAYOUT, 4 * MB, max_tokens=600)


@given(
    stride=st.integers(1, 5000), past=st.integers(0, 300), length=st.integers(0, 2000), page_groups=st.integers(0, 40),
    window=st.none() | st.integers(1, 500),
)  # fmt: skip
def test_page_groups_and_tokens_are_inverse(stride, past, length, page_groups, window):
    g = RowGeometry(2, stride, 4096, window, past)
    needed = g.page_groups_for(length)
    assert needed * g.page_group >= g.resident_bytes(length) + (past * stride if length else 0)
    assert (needed - 1) * g.page_group < g.resident_bytes(length) + past * stride
    assert g.tokens_in(needed, 2000) >= length
    assert g.page_groups_for(g.tokens_in(page_groups, 2000)) <= page_groups
    assert g.row_bytes(2000) >= g.page_groups_for(2000) * g.page_group


def test_what_a_kernel_touches_is_there_at_every_length():
    """Real reads of real memory: past what is mapped they would end this process."""
    policy = policy_of(read_past=PAST)
    store = make_store(policy, 2, 2, 64, "float32")
    assert policy.admit(Admission([Sequence(0, 70, 600)], 70)) is not None
    for _ in range(70, 545):
        store.apply(policy.drain())
        length, cache = policy.length(0), store.layer(1)
        assert not cache.k[policy.row(0), length : length + PAST].any()
        assert policy.grow(0)
        store.apply_in_background(policy.look_ahead())
        policy.check_integrity()
    store.close()


@pytest.mark.parametrize(("length", "groups"), [(78, 1), (79, 2), (128, 2)])
def test_page_groups_for_a_length(length, groups):
    policy, plain = policy_of(read_past=PAST, eager_allocation=False), policy_of(eager_allocation=False)
    for one in (policy, plain):
        assert one.admit(Admission([Sequence(0, length - 1, 1)], length)) is not None
    assert policy.mapped_bytes == groups * 4 * 64 * KB
    assert plain.mapped_bytes == 4 * 64 * KB
    assert policy.usage().live == plain.usage().live
    assert policy.usage().rounding - plain.usage().rounding == policy.mapped_bytes - plain.mapped_bytes


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match="read_past: -1 is not at least 0, or null"):
        policy_of(read_past=-1)


@pytest.mark.parametrize(
    ("kernel", "given", "chosen"), [("fa3", None, 191), ("fa3", 0, 0), ("fa3", 64, 64), ("triton", None, 0)]
)
def test_on_a_gpu_the_kernel_says_how_much(kernel, given, chosen):
    allocator = config_class("vattention")(read_past=given)
    system = System("s", allocator, KernelConfig(kernel), None, "same body", None)
    assert with_room_to_read(system).allocator.read_past == chosen


def test_other_allocators_are_left_alone():
    system = System("s", config_class("paged")(), KernelConfig("fa3"), None, "same body", None)
    assert with_room_to_read(system) is system

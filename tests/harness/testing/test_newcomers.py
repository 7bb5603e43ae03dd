"""A policy of somebody else is priced, stored, served and drawn by what it states, not by whom it inherits from."""

import pytest
from newcomers import NewcomerBlocks, NewcomerRows

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.paged.store import PagedStore
from kvarena.allocators.policy import Admission, CopyBlock, CopyRow, Map, Sequence, SwapIn, SwapOut, Unmap
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.modelled_executor import ActionPrices
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.testing.conformance import check_serving

A100 = typed(DeviceConfig, load("device", "a100-40gb"), "device")
LAYOUT = attention_layout(num_layers=2, num_kv_heads=2, head_size=64, dtype="float32")
BLOCKS = PagedConfig(block_size=8, swap_bytes="1MB")
ROWS = VAttentionConfig(page_group="64KB", max_rows=8)
POOL = 4 << 20
ACTIONS = [Map(0, 0, 0, 0), Unmap(0, 0, 0, 0), CopyBlock(0, 1), CopyRow(0, 0, 1, 0, 64), SwapOut(0, 0), SwapIn(0, 0)]


@pytest.mark.parametrize(
    ("ours", "newcomers", "config"),
    [(PagedPolicy, NewcomerBlocks, BLOCKS), (VAttentionPolicy, NewcomerRows, ROWS)],
    ids=["blocks", "rows"],
)
def test_a_newcomer_pays_what_ours_pays(ours, newcomers, config):
    prices = action_prices(A100, newcomers(config, LAYOUT, POOL, 64))
    assert not issubclass(newcomers, ours)
    assert prices == action_prices(A100, ours(config, LAYOUT, POOL, 64))
    for action in ACTIONS:
        kinds = (CopyBlock, SwapIn, SwapOut) if ours is PagedPolicy else (Map, Unmap)
        if isinstance(action, (*kinds, CopyRow)):
            assert prices.total_ps([action]) > 0


def test_a_fork_of_a_newcomer_is_not_copied_for_nothing():
    policy = NewcomerBlocks(BLOCKS, LAYOUT, POOL, 64)
    assert policy.admit(Admission([Sequence(0, 5, 9)], 5)) is not None
    assert policy.sharing.fork(0, Sequence(1, 5, 9))
    assert policy.grow_each([0, 1]) == 2
    actions = policy.drain()
    assert [type(action) for action in actions] == [CopyBlock]
    assert action_prices(A100, policy).total_ps(actions) == round(2 * 8 * LAYOUT.token_bytes / 1555e9 * 1e12)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
def test_what_a_policy_has_not_sized_is_never_free(action):
    with pytest.raises(UserError, match=type(action).__name__):
        ActionPrices().total_ps([action])
    stated = action_prices(
        A100, StaticPolicy(StaticConfig(), LAYOUT, POOL, max_tokens=64)
    )  # neither blocks nor page-groups
    if isinstance(action, CopyRow):
        assert stated.total_ps([action]) > 0
    else:
        with pytest.raises(UserError, match="has not said how large"):
            stated.total_ps([action])


def test_swaps_of_blocks_without_a_size_are_refused():
    policy = NewcomerBlocks(BLOCKS, LAYOUT, POOL, 64)
    policy.block_size = None
    with pytest.raises(UserError, match=r"newcomer swaps blocks.*block_size"):
        action_prices(A100, policy)


@pytest.mark.parametrize(
    ("newcomers", "config", "kind"), [(NewcomerBlocks, BLOCKS, PagedStore), (NewcomerRows, ROWS, VirtualStore)]
)
def test_a_newcomer_gets_the_store_that_it_needs(newcomers, config, kind):
    store = make_store(newcomers(config, LAYOUT, POOL, 64), 2, 2, 64, "float32")
    assert type(store) is kind
    store.close()


@pytest.mark.parametrize(
    ("newcomers", "config"),
    [(NewcomerBlocks, PagedConfig(block_size=4)), (NewcomerRows, VAttentionConfig(page_group="64KB"))],
)
def test_a_newcomer_serves_a_model(newcomers, config):
    def make(layout, pool_bytes, max_tokens):
        pages = pool_bytes if newcomers is NewcomerBlocks else 40 * 64 * 1024
        return newcomers(config, layout, pages, max_tokens)

    assert check_serving(make).most_running > 1


@pytest.mark.parametrize(
    ("ours", "newcomers", "config"), [(PagedPolicy, NewcomerBlocks, BLOCKS), (VAttentionPolicy, NewcomerRows, ROWS)]
)
def test_a_newcomer_shows_what_its_sequences_hold(ours, newcomers, config):
    seq, shown = Sequence(0, 20, 9), []
    for policy in (ours(config, LAYOUT, POOL, 64), newcomers(config, LAYOUT, POOL, 64)):
        assert policy.admit(Admission([seq], 20)) is not None
        shown.append(policy.holdings([seq]))
    assert shown[0] == shown[1]
    assert shown[0].of[0].leaves[0] == 20 * LAYOUT.token_bytes


def test_a_policy_that_shares_nothing_is_handed_sequences_one_by_one():
    policy = NewcomerBlocks(BLOCKS, LAYOUT, POOL, 64)
    policy.sharing = None
    scheduler = make_scheduler(scheduler_class("vllm")(), policy, 64)
    scheduler.submit(Request(0, 8, 4))
    assert [chunk.tokens for chunk in scheduler.schedule(0).prefills] == [8]
    with pytest.raises(UserError, match="newcomer serves no requests of several sequences"):
        scheduler.submit(Group([Request(1, 8, 4), Request(2, 8, 4)]).first)
    with pytest.raises(UserError, match="newcomer keeps no prefixes"):
        scheduler.keep_prefix(Prefix(-1, 8))

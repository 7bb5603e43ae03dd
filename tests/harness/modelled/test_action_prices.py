"""Prices of an allocator's actions, against what the papers measured."""

import pandas as pd
import pytest

from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.model import load_preset
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.paths import PUBLISHED

LAYOUT = load_preset("opt-13b").kv_layout()
POOL = 1 << 34
A100 = typed(DeviceConfig, load("device", "a100-40gb"), "device")
MS = 10**9  # picoseconds


@pytest.mark.parametrize(("kind", "way"), [("swap_in", "in"), ("swap_out", "out")])
def test_swaps_of_256_tokens_as_in_fig_19a(kind: str, way: str) -> None:
    table = pd.read_csv(PUBLISHED / "pagedattention_figures.csv")
    points = table[(table.figure == "fig19a") & table.system.str.lower().str.contains(f"swap {way}$")]
    assert len(points) == 9
    for block_size, published_ms in zip(points.x.astype(int), points.value, strict=True):
        policy = PagedPolicy(PagedConfig(block_size=block_size, swap_bytes="1GB"), LAYOUT, POOL, max_tokens=2048)
        ours_ms = 256 // block_size * getattr(action_prices(A100, policy), f"{kind}_ps") / MS
        assert ours_ms == pytest.approx(published_ms, rel=0.08), block_size


def test_a_page_group_is_mapped_in_every_tensor() -> None:
    plain, sliced = (
        action_prices(
            A100,
            VAttentionPolicy(
                VAttentionConfig(page_group="64KB", tensor_slicing=slicing), LAYOUT, POOL, max_tokens=2048
            ),
        )
        for slicing in (False, True)
    )
    assert plain.map_ps == (80 * 8_000_000,)  # 40 layers, K and V, 8 us each
    assert plain.unmap_ps == (80 * 2_000_000,)
    assert sliced.map_ps == (2 * 8_000_000,)


def test_a_copied_block_is_read_and_written() -> None:
    prices = action_prices(A100, PagedPolicy(PagedConfig(), LAYOUT, POOL, max_tokens=2048))
    assert prices.copy_block_ps == pytest.approx(2 * 16 * 819_200 / 1555e9 * 1e12)
    assert prices.swap_in_ps is None  # it has no CPU pool


def test_reserving_allocators_do_nothing() -> None:
    assert action_prices(A100, StaticPolicy(StaticConfig(), LAYOUT, POOL, max_tokens=2048)).total_ps([]) == 0


def test_a_device_without_the_page_groups_time_is_refused() -> None:
    bare = DeviceConfig("bare", "modelled", map_us={"2MB": 40}, unmap_us={"2MB": 34})
    with pytest.raises(UserError, match=r"device\.map_us.*64KB"):
        action_prices(bare, VAttentionPolicy(VAttentionConfig(page_group="64KB"), LAYOUT, POOL, max_tokens=2048))

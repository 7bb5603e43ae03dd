"""What an allocator's actions cost on a modelled device: copies of blocks and rows, swaps over PCIe, driver calls."""

from collections.abc import Sequence

from kvarena.allocators.paged import PagedPolicy
from kvarena.allocators.paged_reserved import PagedReservedPolicy
from kvarena.allocators.policy import Policy
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vattention import VAttentionPolicy
from kvarena.errors import UserError
from kvarena.harness.device_model import DeviceConfig
from kvarena.harness.modelled_executor import ActionPrices
from kvarena.harness.step_model import PS_PER_S

_PS_PER_US = PS_PER_S // 10**6


def action_prices(device: DeviceConfig, policy: Policy) -> ActionPrices:
    """Prices of the actions that `policy` can decide. Raises UserError where the device lacks a number for one."""
    if isinstance(policy, PagedPolicy):
        return _block_prices(device, policy)
    if isinstance(policy, VAttentionPolicy):
        return _page_group_prices(device, policy)
    if isinstance(policy, PagedReservedPolicy):
        return ActionPrices(copy_block_ps=_copy_block_ps(device, policy))
    return ActionPrices(copy_row_fs=_copy_row_fs(device, [group.num_tensors for group in policy.kv_layout.groups]))


def _copy_block_ps(device: DeviceConfig, policy: PagedPolicy | PagedReservedPolicy) -> int:
    """A copied block is read and written in device memory."""
    block_bytes = policy.block_size * policy.kv_layout.token_bytes
    return round(2 * block_bytes / (device.need("bandwidth_gb_per_s") * 1e9) * PS_PER_S)


def _copy_row_fs(device: DeviceConfig, tensors: Sequence[int]) -> tuple[int, ...]:
    """A copied byte of a row is read and written in every tensor of its layer group."""
    byte_s = 2 / (device.need("bandwidth_gb_per_s") * 1e9)
    return tuple(round(n * byte_s * PS_PER_S * 1000) for n in tensors)


def _block_prices(device: DeviceConfig, policy: PagedPolicy) -> ActionPrices:
    """A swapped block crosses PCIe, one call for each tensor."""
    copies = sum(group.num_tensors for group in policy.kv_layout.groups)
    block_bytes = policy.block_size * policy.kv_layout.token_bytes
    on_device_ps = _copy_block_ps(device, policy)
    if not policy.can_swap:
        return ActionPrices(copy_block_ps=on_device_ps)

    def over_pcie(way: str) -> int:
        moving_s = block_bytes / (device.need(f"copy_{way}_gb_per_s") * 1e9)
        return round(moving_s * PS_PER_S + copies * device.need(f"copy_{way}_us") * _PS_PER_US)

    return ActionPrices(on_device_ps, swap_out_ps=over_pcie("out"), swap_in_ps=over_pcie("in"))


def _page_group_prices(device: DeviceConfig, policy: VAttentionPolicy) -> ActionPrices:
    """An action maps or unmaps one page-group in every tensor of a layer group, one call after the other."""
    size = format_bytes(policy.page_group_bytes)
    for key in ("map_us", "unmap_us"):
        if size not in getattr(device, key):
            raise UserError(f"device.{key} ({device.name}) has no time for page-groups of {size}, which needs one")
    tensors = [geometry.num_tensors for geometry in policy.geometries]
    return ActionPrices(
        map_ps=tuple(round(n * device.map_us[size] * _PS_PER_US) for n in tensors),
        unmap_ps=tuple(round(n * device.unmap_us[size] * _PS_PER_US) for n in tensors),
        copy_row_fs=_copy_row_fs(device, tensors),
    )

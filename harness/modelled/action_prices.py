"""What an allocator's actions cost on a modelled device: copies of blocks and rows, swaps over PCIe, driver calls.

Prices follow from the sizes that a policy states (`allocators/policy.py`), whoever wrote it. An action that it has
stated no size for has no price, and whoever takes it is told so.
"""

from kvarena.allocators.policy import Policy
from kvarena.allocators.sizes import format_bytes
from kvarena.errors import UserError
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.modelled_executor import ActionPrices
from kvarena.harness.modelled.step_model import PS_PER_S

_PS_PER_US = PS_PER_S // 10**6


def action_prices(device: DeviceConfig, policy: Policy) -> ActionPrices:
    """Prices of the actions that `policy` can decide. Raises UserError where the device lacks a number for one."""
    swaps = policy.swapping is not None
    return ActionPrices(
        copy_block_ps=_copy_block_ps(device, policy) if policy.block_size else None,
        swap_out_ps=_over_pcie_ps(device, policy, "out") if swaps else None,
        swap_in_ps=_over_pcie_ps(device, policy, "in") if swaps else None,
        map_ps=_driver_ps(device, policy, "map_us"),
        unmap_ps=_driver_ps(device, policy, "unmap_us"),
        copy_row_fs=_copy_row_fs(device, policy),
    )


def _block_bytes(policy: Policy) -> int:
    """Bytes of a block over all tensors. Raises UserError for a policy that states no block."""
    if policy.block_size is None:
        raise UserError(f"allocator {policy.name} swaps blocks and does not say how large they are: set its block_size")
    return policy.block_size * policy.kv_layout.token_bytes


def _copy_block_ps(device: DeviceConfig, policy: Policy) -> int:
    """A copied block is read and written in device memory."""
    return round(2 * _block_bytes(policy) / (device.need("bandwidth_gb_per_s") * 1e9) * PS_PER_S)


def _copy_row_fs(device: DeviceConfig, policy: Policy) -> tuple[int, ...]:
    """A copied byte of a row is read and written in every tensor of its layer group."""
    byte_s = 2 / (device.need("bandwidth_gb_per_s") * 1e9)
    groups = policy.geometries or policy.kv_layout.groups
    return tuple(round(group.num_tensors * byte_s * PS_PER_S * 1000) for group in groups)


def _over_pcie_ps(device: DeviceConfig, policy: Policy, way: str) -> int:
    """A swapped block crosses PCIe, one call for each tensor."""
    copies = sum(group.num_tensors for group in policy.kv_layout.groups)
    moving_s = _block_bytes(policy) / (device.need(f"copy_{way}_gb_per_s") * 1e9)
    return round(moving_s * PS_PER_S + copies * device.need(f"copy_{way}_us") * _PS_PER_US)


def _driver_ps(device: DeviceConfig, policy: Policy, key: str) -> tuple[int, ...]:
    """An action maps or unmaps one page-group in every tensor of a layer group, one call after the other."""
    times_us: dict[str, float] = getattr(device, key)
    for geometry in policy.geometries:
        size = format_bytes(geometry.page_group)
        if size not in times_us:
            raise UserError(f"device.{key} ({device.name}) has no time for page-groups of {size}, which needs one")
    return tuple(round(g.num_tensors * times_us[format_bytes(g.page_group)] * _PS_PER_US) for g in policy.geometries)

"""How many bytes a device has left for K/V, as vLLM's memory analyser of 2023 reckons."""

from kvarena.errors import UserError
from kvarena.harness.model.config import DTYPE_BYTES, ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig

GIB = 1 << 30
WORKSPACE_BYTES = GIB


def check_fits(device: DeviceConfig, model: ModelConfig, pool_bytes: int = 0) -> None:
    """Raises UserError where a device has no room for its share of the weights, and a pool of so many bytes beside."""
    weights, pool, there_is = model.shard().weight_bytes / GIB, pool_bytes / GIB, device.need("memory_gib")
    if weights > there_is:
        raise UserError(
            f"model={model.name} on {model.tp} x device={device.name}: the weights do not fit, {weights:.1f} GiB on "
            f"each of {there_is:g} GiB; raise model.tp or take a larger device"
        )
    if weights + pool > there_is:
        raise UserError(
            f"model={model.name} on {model.tp} x device={device.name}: weights of {weights:.1f} GiB and a K/V pool of "
            f"{pool:.1f} GiB do not fit its {there_is:g} GiB; params.pool_bytes sets the pool where it is given"
        )


def kv_pool_bytes(device: DeviceConfig, model: ModelConfig, step_tokens: int = 2560, utilization: float = 0.95) -> int:
    """Bytes for K/V over all `model.tp` devices: what weights, activations of `step_tokens` and 1 GiB leave.

    Activations are two buffers, each of the wider of the shard's QKV or feed-forward beside the residual, and the
    logits, which every device gathers whole. Raises UserError where nothing is left.
    """
    check_fits(device, model)
    shard = model.shard()
    widest = max(3 * shard.num_heads * shard.head_size, shard.ffn_size) + model.hidden_size
    activations = 2 * step_tokens * max(widest, model.vocab_size) * DTYPE_BYTES[model.dtype]
    usable = int(utilization * device.need("memory_gib") * GIB)
    left = usable - shard.weight_bytes - activations - WORKSPACE_BYTES
    if left <= 0:
        raise UserError(
            f"model={model.name} on {model.tp} x device={device.name}: weights and activations leave "
            f"{left / GIB:.1f} GiB for K/V; raise model.tp or take a larger device"
        )
    return left * model.tp

"""From a config to a model that runs."""

import torch

from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vmm.available import available_bytes
from kvarena.errors import UserError
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.contract import Model
from kvarena.harness.model.llama import Llama
from kvarena.harness.model.opt import OPT
from kvarena.harness.model.weights import Weights, random_weights


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> Model:
    """Make the model, or its shard (`config.shard_only`), with random weights or those of `config.checkpoint`.

    Raises UserError for a checkpoint that is missing, incomplete or of other sizes, and for more weights than the host
    has memory for: it would not refuse, but kill. A GPU refuses.
    """
    local, device = config.on_one_device(), torch.device(device)
    if device.type == "cpu" and local.weight_bytes > (left := available_bytes()):
        raise UserError(
            f"model={config.name}: its weights take {format_bytes(local.weight_bytes)} as {local.dtype}, and "
            f"{format_bytes(left)} of memory are left here. A smaller model fits, or clock=modelled needs no weights"
        )
    if local.checkpoint is None:
        return assemble(local, random_weights(local, device))
    from kvarena.harness.model.checkpoint import load_checkpoint  # reads safetensors: only where one is asked for

    return assemble(local, load_checkpoint(local, device))


def assemble(config: ModelConfig, weights: Weights) -> Model:
    """Put weights into the model of their family."""
    return Llama(config, weights) if config.family == "llama" else OPT(config, weights)

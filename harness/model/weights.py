"""A model's weights: by name, drawn from a seed or gathered from a checkpoint."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.parameters import Parameter, Part, list_parameters

Weights = dict[str, Tensor]  # names and shapes are those of list_parameters()

ON_DEVICE_PARAMETERS = 200_000_000  # a larger model is drawn where it lives: seconds, not minutes


def random_weights(config: ModelConfig, device: torch.device) -> Weights:
    """Draw the weights that `config.seed` means.

    Small models are drawn on the CPU and are the same bits on every platform: torch's uniform floats are shifted and
    scaled integers, whereas its normal ones go through a logarithm whose last bit depends on the CPU's vector width.
    Models above ON_DEVICE_PARAMETERS are drawn by the device's own generator, and repeat on that kind of device.
    """
    drawn_on = device if config.num_parameters() > ON_DEVICE_PARAMETERS else torch.device("cpu")
    generator = torch.Generator(drawn_on).manual_seed(config.seed)
    return {p.name: _draw(p, config, generator).to(device) for p in list_parameters(config)}


def _draw(parameter: Parameter, config: ModelConfig, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, config.dtype)
    if parameter.std == 0.0:
        return torch.full(parameter.shape, parameter.mean, dtype=dtype, device=generator.device)
    drawn_in = torch.float32 if generator.device.type == "cpu" else dtype  # all dtypes round the same numbers
    values = torch.rand(parameter.shape, generator=generator, dtype=drawn_in, device=generator.device)
    half_width = sqrt(3.0) * parameter.std
    return values.mul_(2 * half_width).sub_(half_width - parameter.mean).to(dtype)


def weights_from_hf(config: ModelConfig, state: Mapping[str, Tensor], device: torch.device) -> Weights:
    """Gather the weights from tensors under Hugging Face's names, in `config.dtype`.

    Raises UserError naming the first tensor that is missing, or has a wrong shape (and both shapes).
    """
    return {parameter.name: _gather(parameter, config, state, device) for parameter in list_parameters(config)}


def _gather(parameter: Parameter, config: ModelConfig, state: Mapping[str, Tensor], device: torch.device) -> Tensor:
    gathered = torch.empty(parameter.shape, dtype=getattr(torch, config.dtype), device=device)
    row = 0
    for part in parameter.parts:
        gathered[row : row + part.rows] = _look_up(part, parameter.shape[1:], config.name, state)
        row += part.rows
    return gathered


def _look_up(part: Part, row_shape: tuple[int, ...], model: str, state: Mapping[str, Tensor]) -> Tensor:
    headless = part.source.removeprefix("model.")  # files saved from the model without its output lack the prefix
    name = part.source if part.source in state else headless
    if name not in state:
        raise UserError(f"model.checkpoint ({model}): tensor {part.source} is missing")
    tensor, expected = state[name], (part.rows, *row_shape)
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"model.checkpoint ({model}): tensor {name} has shape {tuple(tensor.shape)}, expected {expected}"
        )
    return tensor


def layer_weights(weights: Weights, layer: int) -> Weights:
    """Weights of one layer, their names without its prefix and with underscores for dots."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix).replace(".", "_"): w for name, w in weights.items() if name.startswith(prefix)}

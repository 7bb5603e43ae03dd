"""A device and an engine fitted to steps of known load (`timed_steps.py`).

    step = host_step + host_sequence x decodes + max(weights, token x tokens) + context x K/V read + pair x pairs

The device is measured: how fast memory can be read, and how fast matrices multiply at best. Of the engine there are an
efficiency per kernel (reading weights, multiplying, reading K/V) and two constants of the host. A replay enters none.
"""

import os
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy import optimize

from kvarena.harness.model.config import DTYPE_BYTES, ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.modelled.step_model import PS_PER_S, StepLoad

Floats = NDArray[np.float64]


class Limits(NamedTuple):
    """What the machine can do at best."""

    read_gb_per_s: float
    tflop_per_s: float  # one large matrix product, of the model's dtype


class Fitted(NamedTuple):
    """A device model and an engine that go together."""

    device: DeviceConfig
    engine: EngineConfig


def fit(steps: pd.DataFrame, limits: Limits, model: ModelConfig, name: str) -> Fitted:
    """Fit to rows of `KnownStep`, one per load: least squares of log(predicted / measured) over whole steps.

    Nothing may be faster than the machine's limits, so efficiencies stay at or below 1. What was fitted holds for this
    machine and this model, and the engine says so.
    """
    floors = _floors(limits, model)
    measured = steps.step_s.to_numpy()

    def log_errors(x: Floats) -> Floats:
        return np.asarray(np.log(_step_s(_Constants(*x), floors, steps) / measured))

    starts = [_Constants(share * measured.min(), 0.0, 0.5, kv, flop) for share in (0.1, 0.5) for kv in (0.2, 0.8)
              for flop in (0.3, 0.8)]  # fmt: skip
    bounds = _Constants(0, 0, 0.01, 0.01, 0.01), _Constants(measured.max(), measured.max(), 1, 1, 1)
    found = [optimize.least_squares(log_errors, start, bounds=bounds, x_scale="jac") for start in starts]
    best = _Constants(*(float(x) for x in min(found, key=lambda result: result.cost).x))
    engine = EngineConfig(
        name=name,
        overlaps_host=False,  # on a CPU the host is the device
        host_step_us=1e6 * best.step_s,
        host_sequence_us=1e6 * best.sequence_s,
        weights_efficiency=best.weights,
        kv_efficiency=best.kv,
        flop_efficiency=best.flop,
        devices=[name],
        models=[model.name],
    )
    return Fitted(device_of(limits, name), engine)


class _Constants(NamedTuple):
    """What is fitted: seconds of the host, and efficiencies."""

    step_s: float
    sequence_s: float
    weights: float
    kv: float
    flop: float


class _Floors(NamedTuple):
    """Seconds that the machine needs at its limits."""

    weights_s: float  # to read all weights
    context_s: float  # to read the K/V of a token
    token_s: float  # to multiply a token with all weights
    pair_s: float  # for a (query, key) pair of a prompt


def _floors(limits: Limits, model: ModelConfig) -> _Floors:
    parameters, byte_s = model.step_parameters(), 1 / (limits.read_gb_per_s * 1e9)
    flop_s = 1 / (limits.tflop_per_s * 1e12)
    return _Floors(
        parameters * DTYPE_BYTES[model.dtype] * byte_s,
        model.kv_layout().token_bytes * byte_s,
        2 * parameters * flop_s,
        4 * model.num_heads * model.head_size * model.num_layers * flop_s,
    )


def _step_s(x: _Constants, floors: _Floors, steps: pd.DataFrame) -> Floats:
    """The formula of the module's docstring, as `harness/modelled/roofline.py` sets it up."""
    projections_s = np.maximum(floors.weights_s / x.weights, floors.token_s / x.flop * steps.tokens)
    attention_s = floors.context_s / x.kv * steps.context + floors.pair_s / x.flop * steps.pairs
    return np.asarray(x.step_s + x.sequence_s * steps.decodes + projections_s + attention_s)


def device_of(limits: Limits, name: str) -> DeviceConfig:
    """The machine as a device model; it has no numbers for swaps and page-groups, so those are refused."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return DeviceConfig(name, "modelled", memory_bytes / 2**30, limits.read_gb_per_s, limits.tflop_per_s)


def predicted_s(fitted: Fitted, model: ModelConfig, steps: pd.DataFrame) -> Floats:
    """Seconds that the fitted step model gives each load."""
    step_model = step_model_of(fitted.device, fitted.engine, model, "vllm", attention=None)  # it tells no kernels apart
    loads = steps[list(StepLoad._fields)].round().astype(int).itertuples(index=False)
    return np.array([step_model.step_ps(StepLoad(*load)) for load in loads]) / PS_PER_S


def yaml_files(fitted: Fitted) -> dict[str, str]:
    """device.yaml and engine.yaml as they would stand in conf/, by name."""
    name = fitted.device.name
    use = (
        "# Fitted by experiment=calibrate on this machine. To use it, copy device.yaml to\n"
        f"# conf/device/{name}.yaml and engine.yaml to conf/engine/{name}.yaml, then:\n"
        f"# clock=modelled device={name} engine={name} model={', '.join(fitted.engine.models)}\n"
    )
    return {f"{kind}.yaml": use + OmegaConf.to_yaml(OmegaConf.create(asdict(getattr(fitted, kind))))
            for kind in Fitted._fields}  # fmt: skip

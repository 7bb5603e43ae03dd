"""The papers' models with random bfloat16 weights, drawn on the device; one tensor-parallel shard where two are due."""

import time

import torch
from torch import Tensor

from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import build_model
from kvarena.harness.model.contract import Model

SHARD = ", one of 2 shards"
MODELS = {
    "cuda": ["yi-6b", "llama-3-8b", "opt-13b", f"yi-34b{SHARD}", "yi-34b"],
    "cpu": ["tiny-llama", f"tiny-llama{SHARD}", "tiny-opt"],
}
SECONDS = 20.0  # that weights may take


def cases(device: str) -> list[str]:
    """The small ones first."""
    return MODELS[device]


def run(case: str, context: Context) -> Values:
    """Draw the weights, then one step of four tokens: finite logits of the right shape."""
    shard = {"tp": 2, "shard_only": True} if case.endswith(SHARD) else {}
    config = load_preset(case.removesuffix(SHARD), dtype="bfloat16", **shard)
    if context.on_gpu:
        torch.cuda.empty_cache()  # the last case's weights
    start = time.perf_counter()
    model = build_model(config, context.device)
    if context.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    check_step(model)
    if seconds > SECONDS:
        raise FailedError(f"drawing the weights took {seconds:.0f} s; at most {SECONDS:g} s was meant")
    return {"weights, s": round(seconds, 2), "weights, GB": round(model.config.weight_bytes / 1e9, 2)}


def check_step(model: Model) -> None:
    """One step without a cache: attention passes its queries on. Raises FailedError."""
    tokens = torch.arange(4, device=model.device)
    last = tokens[-1:]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    logits = model.forward(tokens, tokens, attend, last)
    if logits.shape != (1, model.config.vocab_size) or not logits.isfinite().all():
        raise FailedError(f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}")

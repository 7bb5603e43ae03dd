"""The papers' models at full size, on torch's meta device: every shape of a step, and no memory."""

from math import prod

import pytest
import torch

from kvarena.errors import UserError
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import assemble
from kvarena.harness.model.parameters import list_parameters
from kvarena.harness.model.weights import ON_DEVICE_PARAMETERS, random_weights

MODELS = ("yi-6b", "llama-3-8b", "yi-34b", "opt-13b")
BATCH, TOKENS = 3, 7


def config_of(name: str, shards: int):
    return load_preset(name, dtype="bfloat16", tp=shards, shard_only=shards > 1).on_one_device()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_whole_model_and_of_one_shard(name, shards):
    config = config_of(name, shards)
    weights = {p.name: torch.empty(p.shape, dtype=torch.bfloat16, device="meta") for p in list_parameters(config)}
    assert sum(weight.nbytes for weight in weights.values()) == config.weight_bytes
    model = assemble(config, weights)
    layers = []

    def attend(layer, q, k, v):
        assert q.shape == (TOKENS, config.num_heads, config.head_size)
        assert k.shape == v.shape == (TOKENS, config.num_kv_heads, config.head_size)
        layers.append(layer)
        return q

    tokens = torch.zeros(TOKENS, dtype=torch.int64, device="meta")
    logits = model.forward(tokens, tokens, attend, tokens[:BATCH])
    assert layers == list(range(config.num_layers))
    assert (logits.shape, logits.dtype) == ((BATCH, config.vocab_size), torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_a_shard_has_half_of_what_is_divided(name):
    whole, shard = config_of(name, 1), config_of(name, 2)
    divided = [
        (prod(a.shape), prod(b.shape)) for a, b in zip(list_parameters(whole), list_parameters(shard), strict=True)
    ]
    assert all(theirs in (ours, ours // 2) for ours, theirs in divided)
    assert shard.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=0.01)
    assert shard.kv_layout().token_bytes * 2 == whole.kv_layout().token_bytes


@pytest.mark.parametrize("name", MODELS)
def test_two_shards_at_once_are_refused(name):
    with pytest.raises(UserError, match=r"model\.shard_only=true runs one"):
        load_preset(name, tp=2).on_one_device()


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_this_size_are_drawn_where_the_model_lives(name, monkeypatch):
    """Nothing is drawn on the host and sent: that would take minutes."""
    drawn = []

    class Generator:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return self

    def rand(shape, generator, dtype, device):
        drawn.append((device, dtype))
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "rand", rand)
    config = config_of(name, 2)
    assert config.num_parameters() > ON_DEVICE_PARAMETERS
    random_weights(config, torch.device("meta"))
    assert set(drawn) == {(torch.device("meta"), torch.bfloat16)}

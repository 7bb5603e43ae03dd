"""Random weights, and what a forward pass owes whoever calls it."""

import hashlib

import pytest
import torch

from kvarena.harness.model import load_preset
from kvarena.harness.model import weights as weights_module
from kvarena.harness.model.build import build_model
from kvarena.harness.model.parameters import list_parameters
from kvarena.harness.model.reference import Reference
from kvarena.harness.model.weights import random_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FAMILIES = ["tiny-llama", "tiny-opt"]


def prompt_of(config, tokens, seed=0):
    return torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "digest"),
    [("tiny-llama", "0d9b131ced3c4633"), ("tiny-opt", "67674c3f6425828c")],
)
def test_a_seed_means_the_same_bits_everywhere(name, digest):
    weights = random_weights(load_preset(name), CPU)
    digests = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values()))
    assert digests.hexdigest()[:16] == digest


def test_another_seed_means_other_weights():
    first, second = (random_weights(load_preset("tiny-llama", seed=seed), CPU)["output"] for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_wide_ones_rounded(dtype):
    wide = random_weights(load_preset("tiny-opt"), CPU)
    narrow = random_weights(load_preset("tiny-opt", dtype=dtype), CPU)
    assert all(torch.equal(narrow[name], wide[name].to(getattr(torch, dtype))) for name in wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_too_large_for_the_cpu_are_drawn_in_place(name, dtype, monkeypatch):
    monkeypatch.setattr(weights_module, "ON_DEVICE_PARAMETERS", 0)
    config = load_preset(name, dtype=dtype)
    weights = random_weights(config, CPU)
    for parameter in list_parameters(config):
        drawn = weights[parameter.name].float()
        assert tuple(drawn.shape) == parameter.shape
        assert float(drawn.mean()) == pytest.approx(parameter.mean, abs=0.02)
        assert float(drawn.std()) == pytest.approx(parameter.std, rel=0.2)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt", "bench-llama", "bench-opt"])
def test_greedy_tokens_vary(name):
    model = build_model(load_preset(name))
    reference = Reference(model)
    logits = reference.step({seq: prompt_of(model.config, 16, seed=seq) for seq in range(4)})
    tokens = [logits.argmax(-1)]
    for _ in range(24):
        logits = reference.step(dict(enumerate(tokens[-1][:, None])))
        tokens.append(logits.argmax(-1))
    assert logits.isfinite().all()
    assert all(len(sequence.unique()) >= 4 for sequence in torch.stack(tokens, dim=1))
    assert len(torch.stack(tokens).flatten().unique()) >= 20


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_does_not_depend_on_its_batch(name):
    model = build_model(load_preset(name))
    prompts = {seq: prompt_of(model.config, 5 + 3 * seq, seed=seq) for seq in range(6)}
    together = Reference(model).step(prompts)
    for seq, prompt in prompts.items():
        alone = Reference(model).step({seq: prompt})[0]
        torch.testing.assert_close(together[seq], alone, rtol=0, atol=1e-5)  # other GEMM shapes sum in other orders


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_chunks_beside_decodes_give_the_same_logits(name):
    model = build_model(load_preset(name))
    prompt, other = prompt_of(model.config, 20), prompt_of(model.config, 9, seed=1)
    whole = Reference(model).step({0: prompt})[0]
    chunked = Reference(model)
    chunked.step({7: other, 0: prompt[:6]})
    chunked.step({0: prompt[6:13], 7: other[:1]})
    logits = chunked.step({7: other[1:2], 0: prompt[13:]})[1]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_tokens_matters(name):
    model = build_model(load_preset(name))
    prompt = prompt_of(model.config, 12)
    forwards = Reference(model).step({0: prompt})
    swapped = Reference(model).step({0: prompt[[1, 0, *range(2, 12)]]})  # attention alone could not tell them apart
    assert not torch.allclose(forwards, swapped, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_attend_is_handed_what_its_contract_says(name):
    model = build_model(load_preset(name))
    config, seen = model.config, []

    def attend(layer, q, k, v):
        assert q.shape == (5, config.num_heads, config.head_size)
        assert k.shape == v.shape == (5, config.num_kv_heads, config.head_size)
        assert q.is_contiguous()
        assert k[0].is_contiguous()
        assert v[0].is_contiguous()
        seen.append(layer)
        return torch.zeros_like(q)

    logits = model.forward(prompt_of(config, 5), torch.arange(5), attend, torch.tensor([1, 4]))
    assert logits.shape == (2, config.vocab_size)
    assert seen == list(range(config.num_layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_shard_runs_alone(name):
    model = build_model(load_preset(name, tp=2, shard_only=True))
    logits = Reference(model).step({0: prompt_of(model.config, 9)})
    assert logits.shape == (1, load_preset(name).vocab_size // 2)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_narrow_dtypes_stay_near_float32(name, dtype):
    prompt = prompt_of(load_preset(name), 16)
    wide = Reference(build_model(load_preset(name))).step({0: prompt})
    narrow = Reference(build_model(load_preset(name, dtype=dtype))).step({0: prompt})
    assert narrow.dtype == getattr(torch, dtype)
    assert float((narrow.float() - wide).abs().max()) < 0.1 * float(wide.abs().max())

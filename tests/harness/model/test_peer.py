"""Our models against those of transformers, with the same weights: logits equal through prefill and 32 decode steps."""

from dataclasses import replace

import pytest
import torch

from kvarena.harness.model import load_preset
from kvarena.harness.model.build import assemble, build_model
from kvarena.harness.model.checkpoint import config_of_checkpoint
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.contract import Model
from kvarena.harness.model.reference import Reference
from kvarena.harness.model.weights import weights_from_hf

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is a development dependency")

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5  # of the largest logit: float32, summed in another order (8e-7 was seen)
PROMPTS = (1, 7, 40)  # tokens; decoded together in one batch, by the peer one by one
DECODE_STEPS = 32

CONFIGS = {
    "llama": load_preset("tiny-llama"),
    "llama-tied": load_preset("tiny-llama", num_kv_heads=4, tied_embeddings=True, rope_theta=5e6),
    "llama-wide-heads": load_preset("tiny-llama", head_size=32, num_kv_heads=1),
    "opt": load_preset("tiny-opt"),
    "opt-without-biases": load_preset("tiny-opt", biases=False),
}


def peer_of(config: ModelConfig):
    """A model of transformers with our sizes and every parameter random: biases and norms too."""
    sizes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_tokens,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    peer = _llama_peer(config, sizes) if config.family == "llama" else _opt_peer(config, sizes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            spread = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.copy_(1 + spread if "norm" in name and "weight" in name else spread * 0.4)
    return peer.eval()


def _llama_peer(config: ModelConfig, sizes: dict):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    own = dict(num_key_value_heads=config.num_kv_heads, head_dim=config.head_size, intermediate_size=config.ffn_size)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, **own, rms_norm_eps=config.norm_eps, rope_parameters=rope)
    )


def _opt_peer(config: ModelConfig, sizes: dict):
    own = dict(ffn_dim=config.ffn_size, word_embed_proj_dim=config.hidden_size, enable_bias=config.biases, dropout=0.0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **own))


@torch.inference_mode()
def peer_logits(peer, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after a prompt, then after each of the decoded tokens, over the peer's own cache: [1 + tokens, V]."""
    out = peer(prompt[None], use_cache=True)
    logits = [out.logits[0, -1]]
    for token in tokens:
        out = peer(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


def prompts_of(config: ModelConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(config.vocab_size, (n,), generator=generator) for n in PROMPTS]


def greedy_logits(model: Model, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the prompts' last tokens, then of 32 greedy steps of all together: [1 + 32, B, V]."""
    reference = Reference(model)
    logits = [reference.step(dict(enumerate(prompts)))]
    for _ in range(DECODE_STEPS):
        logits.append(reference.step(dict(enumerate(logits[-1].argmax(-1, keepdim=True)))))
    return torch.stack(logits)


def assert_logits_equal(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    config = CONFIGS[name]
    peer = peer_of(config)
    model = assemble(config, weights_from_hf(config, peer.state_dict(), torch.device("cpu")))
    logits = greedy_logits(model, prompts_of(config))
    for index, prompt in enumerate(prompts_of(config)):
        assert_logits_equal(logits[:, index], peer_logits(peer, prompt, logits[:-1, index].argmax(-1)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_what_transformers_saves_we_load(name, shard_size, tmp_path):
    config = CONFIGS[name]
    peer = peer_of(config)
    peer.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    found = config_of_checkpoint(str(tmp_path))
    assert found == replace(config, name=tmp_path.name, checkpoint=str(tmp_path))
    logits = Reference(build_model(found)).step(dict(enumerate(prompts_of(config))))
    for index, prompt in enumerate(prompts_of(config)):
        assert_logits_equal(logits[index], peer_logits(peer, prompt, prompt[:0])[0])


def test_a_checkpoint_saved_without_its_head_loads(tmp_path):
    config = CONFIGS["opt"]
    peer = peer_of(config)
    peer.model.save_pretrained(tmp_path)  # names begin with "decoder." instead of "model.decoder."
    model = build_model(replace(config, checkpoint=str(tmp_path)))
    prompt = prompts_of(config)[2]
    assert_logits_equal(Reference(model).step({0: prompt})[0], peer_logits(peer, prompt, prompt[:0])[0])

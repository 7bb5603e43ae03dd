"""Our models against those of transformers, with the same weights: logits equal through prefill and 32 decode steps."""

import pytest
import torch

from kvarena.harness.model.build import assemble
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.contract import Model
from kvarena.harness.model.presets import load_preset
from kvarena.harness.model.weights import weights_from_hf

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is a development dependency")

TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order
PROMPTS = (1, 7, 40)  # tokens
DECODE_STEPS = 32


class DenseAttend:
    """A cache of one list of tensors per sequence, and attention by its formula."""

    def __init__(self, num_layers: int) -> None:
        self.k = [{} for _ in range(num_layers)]
        self.v = [{} for _ in range(num_layers)]
        self.batch: list[tuple[int, int]] = []  # (sequence, its number of queries) of this step

    def __call__(self, layer, q, k, v):
        outs = []
        counts = [count for _, count in self.batch]
        for (seq, _), qs, ks, vs in zip(self.batch, q.split(counts), k.split(counts), v.split(counts), strict=True):
            self.k[layer][seq] = torch.cat((self.k[layer][seq], ks)) if seq in self.k[layer] else ks.clone()
            self.v[layer][seq] = torch.cat((self.v[layer][seq], vs)) if seq in self.v[layer] else vs.clone()
            outs.append(causal_attention(qs, self.k[layer][seq], self.v[layer][seq]))
        return torch.cat(outs)


def causal_attention(q, k, v):
    """q [n, Hq, D] are the last n of the S tokens of k, v [S, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,shd->hns", q, k) / q.shape[2] ** 0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    return torch.einsum("hns,shd->nhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def step(model: Model, attend: DenseAttend, batch: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """Run one step. batch: (sequence, tokens already in its cache, new tokens). Returns logits [B, V]."""
    attend.batch = [(seq, len(tokens)) for seq, _, tokens in batch]
    tokens = torch.cat([tokens for _, _, tokens in batch])
    positions = torch.cat([torch.arange(past, past + len(tokens)) for _, past, tokens in batch])
    last = torch.tensor([len(tokens) for _, _, tokens in batch]).cumsum(0) - 1
    return model.forward(tokens, positions, attend, last)


def generate(model: Model, prompts: list[torch.Tensor], steps: int) -> torch.Tensor:
    """Greedy decoding of all prompts together: logits [steps + 1, B, V]."""
    attend = DenseAttend(model.config.num_layers)
    logits = [step(model, attend, [(i, 0, prompt) for i, prompt in enumerate(prompts)])]
    for n in range(steps):
        tokens = logits[-1].argmax(-1)
        logits.append(step(model, attend, [(i, len(p) + n, tokens[i : i + 1]) for i, p in enumerate(prompts)]))
    return torch.stack(logits)


def peer_of(config: ModelConfig):
    """A model of transformers with our sizes, every parameter random (its own start has biases 0 and norms 1)."""
    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_tokens,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="eager",
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    if config.family == "llama":
        peer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **common,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_size,
                intermediate_size=config.ffn_size,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
        )
    else:
        peer = transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **common, ffn_dim=config.ffn_size, word_embed_proj_dim=config.hidden_size, enable_bias=config.biases
            )
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            spread = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.copy_(1 + spread if "norm" in name and "weight" in name else spread * 0.4)
    return peer.eval()


@torch.inference_mode()
def peer_logits(peer, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt, then of each decoded token, from the peer's own cache: [1 + tokens, V]."""
    out = peer(prompt[None], use_cache=True)
    logits = [out.logits[0, -1]]
    for token in tokens:
        out = peer(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


CONFIGS = {
    "llama": load_preset("tiny-llama"),
    "llama-mha-tied": load_preset("tiny-llama", num_kv_heads=4, tied_embeddings=True, rope_theta=5e6),
    "llama-head-size-apart": load_preset("tiny-llama", head_size=32, num_kv_heads=1),
    "opt": load_preset("tiny-opt"),
    "opt-without-biases": load_preset("tiny-opt", biases=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    config = CONFIGS[name]
    peer = peer_of(config)
    model = assemble(config, weights_from_hf(config, peer.state_dict(), torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator) for n in PROMPTS]
    logits = generate(model, prompts, DECODE_STEPS)  # [1 + steps, B, V]
    for index, prompt in enumerate(prompts):
        expected = peer_logits(peer, prompt, logits[:-1, index].argmax(-1))
        torch.testing.assert_close(logits[:, index], expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))

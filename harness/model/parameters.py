"""Every tensor of a model: its name, shape, origin in a checkpoint, and how it is drawn when weights are random.

One table serves counting, random weights and checkpoints. Projections that read the same input are one tensor (q, k
and v; gate and up), so that a step makes one large product of them; a checkpoint has them apart.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvarena.harness.model.config import ModelConfig

_EMBEDDING_STD = 0.02  # small beside what the layers add: else tied embeddings make greedy decoding echo its input
_POSITION_STD = 0.05  # learned positions: more than that and they drown the tokens, less and greedy decoding repeats
_BIAS_STD = 0.02
POSITION_OFFSET = 2  # OPT's table of learned positions begins with two rows that it never uses


class Part(NamedTuple):
    """One checkpoint tensor, and its share of the first dimension."""

    source: str  # Hugging Face's name
    rows: int


class Parameter(NamedTuple):
    """One tensor. Its random values are uniform with this mean and standard deviation."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]  # stacked along the first dimension
    mean: float = 0.0
    std: float = 0.0
    gathered: bool = False  # a step picks rows of it, instead of multiplying with it


def list_parameters(config: "ModelConfig") -> list[Parameter]:
    """All tensors of a model, in a fixed order."""
    return list(_llama(config) if config.family == "llama" else _opt(config))


def _llama(config: "ModelConfig") -> Iterator[Parameter]:
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    yield _embedding(config, "model.embed_tokens.weight")
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = _parts(attention, ".weight", {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        yield _scale(f"{ours}.attention_norm", f"{theirs}.input_layernorm.weight", hidden)
        yield _matrix(f"{ours}.qkv", qkv, hidden)
        yield _matrix(f"{ours}.attention_out", _parts(attention, ".weight", {"o_proj": hidden}), queries)
        yield _scale(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm.weight", hidden)
        yield _matrix(f"{ours}.gate_up", _parts(mlp, ".weight", {"gate_proj": ffn, "up_proj": ffn}), hidden)
        yield _matrix(f"{ours}.down", _parts(mlp, ".weight", {"down_proj": hidden}), ffn)
    yield _scale("final_norm", "model.norm.weight", hidden)
    if not config.tied_embeddings:
        yield _matrix("output", (Part("lm_head.weight", config.vocab_size),), hidden)


def _opt(config: "ModelConfig") -> Iterator[Parameter]:
    hidden, ffn, decoder = config.hidden_size, config.ffn_size, "model.decoder"
    heads = config.num_heads * config.head_size
    positions = config.max_tokens + POSITION_OFFSET
    yield _embedding(config, f"{decoder}.embed_tokens.weight")
    table = (Part(f"{decoder}.embed_positions.weight", positions),)
    yield Parameter("positions", (positions, hidden), table, std=_POSITION_STD, gathered=True)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"{decoder}.layers.{layer}"
        attention = f"{theirs}.self_attn"
        qkv = {"q_proj": heads, "k_proj": heads, "v_proj": heads}
        yield from _layer_norm(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm", hidden)
        yield from _linear(config, f"{ours}.qkv", attention, qkv, hidden)
        yield from _linear(config, f"{ours}.attention_out", attention, {"out_proj": hidden}, heads)
        yield from _layer_norm(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm", hidden)
        yield from _linear(config, f"{ours}.up", theirs, {"fc1": ffn}, hidden)
        yield from _linear(config, f"{ours}.down", theirs, {"fc2": hidden}, ffn)
    yield from _layer_norm("final_norm", f"{decoder}.final_layer_norm", hidden)
    if not config.tied_embeddings:
        yield _matrix("output", (Part("lm_head.weight", config.vocab_size),), hidden)


def _parts(module: str, suffix: str, rows: dict[str, int]) -> tuple[Part, ...]:
    return tuple(Part(f"{module}.{name}{suffix}", count) for name, count in rows.items())


def _matrix(name: str, parts: tuple[Part, ...], inputs: int) -> Parameter:
    """A projection, [outputs, inputs]: drawn so that it keeps the variance of its input."""
    return Parameter(name, (sum(part.rows for part in parts), inputs), parts, std=inputs**-0.5)


def _embedding(config: "ModelConfig", source: str) -> Parameter:
    """The token embedding; where it is tied it is also the output projection, which a step multiplies with."""
    shape, parts = (config.vocab_size, config.hidden_size), (Part(source, config.vocab_size),)
    return Parameter("embedding", shape, parts, std=_EMBEDDING_STD, gathered=not config.tied_embeddings)


def _scale(name: str, source: str, size: int) -> Parameter:
    return Parameter(name, (size,), (Part(source, size),), mean=1.0)


def _bias(name: str, parts: tuple[Part, ...]) -> Parameter:
    return Parameter(name, (sum(part.rows for part in parts),), parts, std=_BIAS_STD)


def _layer_norm(name: str, module: str, size: int) -> Iterator[Parameter]:
    yield _scale(f"{name}.weight", f"{module}.weight", size)
    yield _bias(f"{name}.bias", (Part(f"{module}.bias", size),))


def _linear(config: "ModelConfig", name: str, module: str, rows: dict[str, int], inputs: int) -> Iterator[Parameter]:
    yield _matrix(f"{name}.weight", _parts(module, ".weight", rows), inputs)
    if config.biases:
        yield _bias(f"{name}.bias", _parts(module, ".bias", rows))

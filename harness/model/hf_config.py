"""Hugging Face's config.json, read as a ModelConfig. What our models do not compute is refused, not ignored."""

from pathlib import Path
from typing import Any

from kvarena.errors import UserError
from kvarena.harness.model.config import FAMILIES, ModelConfig

# What a value must be, and what it is where the file does not say (transformers' default): our models know no other.
_LLAMA_MUST_BE: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_OPT_MUST_BE: dict[str, Any] = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


def model_config(raw: dict[str, Any], path: Path, dtype: str) -> ModelConfig:
    """Read `raw`, the content of `path`. Raises UserError naming the key that is missing or not supported."""
    return _Reader(raw, path).config(dtype)


class _Reader:
    """One config.json and where it lies, for its errors."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def config(self, dtype: str) -> ModelConfig:
        family = self.raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{self.path}: model_type={family} is not one of: {', '.join(FAMILIES)}")
        sizes = self.llama() if family == "llama" else self.opt()
        return ModelConfig(
            name=self.path.parent.name,
            family=family,
            num_layers=self.size("num_hidden_layers"),
            hidden_size=self.size("hidden_size"),
            num_heads=self.size("num_attention_heads"),
            vocab_size=self.size("vocab_size"),
            max_tokens=self.size("max_position_embeddings"),
            dtype=dtype,
            seed=0,
            **sizes,
        )

    def llama(self) -> dict[str, Any]:
        self.require(_LLAMA_MUST_BE)
        num_heads = self.size("num_attention_heads")
        return {
            "num_kv_heads": self.size("num_key_value_heads", num_heads),
            "head_size": self.size("head_dim", self.size("hidden_size") // num_heads),
            "ffn_size": self.size("intermediate_size"),
            "rope_theta": self.rope_theta(),
            "norm_eps": self.raw.get("rms_norm_eps", 1e-6),
            "tied_embeddings": self.raw.get("tie_word_embeddings", False),
            "biases": False,
        }

    def opt(self) -> dict[str, Any]:
        hidden_size, num_heads = self.size("hidden_size"), self.size("num_attention_heads")
        self.require(_OPT_MUST_BE | {"word_embed_proj_dim": hidden_size})
        return {
            "num_kv_heads": num_heads,
            "head_size": hidden_size // num_heads,
            "ffn_size": self.size("ffn_dim"),
            "rope_theta": None,
            "norm_eps": 1e-5,
            "tied_embeddings": self.raw.get("tie_word_embeddings", True),
            "biases": self.raw.get("enable_bias", True),
        }

    def rope_theta(self) -> float:
        """Base of the rotary frequencies: files of transformers 5 nest it, older ones do not."""
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{self.path}: rope_type={kind} is not supported; only default is")
        return float(rope.get("rope_theta", self.raw.get("rope_theta", 10000.0)))

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; a null one is as good as none."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: {key}={value}, expected a positive integer")
        return value

    def require(self, expected: dict[str, Any]) -> None:
        for key, value in expected.items():
            if (found := self.raw.get(key, value)) != value:
                raise UserError(f"{self.path}: {key}={found} is not supported; only {value} is")

"""The dimensions of a model, and what follows from them: parameters, weight bytes, KV layout, one shard of it."""

from dataclasses import dataclass, replace
from math import prod

from kvarena.allocators.kv_layout import KVLayout, attention_layout
from kvarena.errors import UserError
from kvarena.harness.model.parameters import list_parameters

FAMILIES = ("llama", "opt")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(kw_only=True)  # not frozen: as a Hydra schema a frozen class cannot be overridden; replace(), never assign
class ModelConfig:
    """A model as `conf/model/*.yaml` describes it. Every size is of the whole model, whatever `tp` says.

    Raises UserError, naming the key, where the sizes contradict each other.
    """

    name: str
    family: str  # "llama": RMSNorm, RoPE, SwiGLU, GQA; "opt": LayerNorm, learned positions, ReLU, MHA
    num_layers: int
    hidden_size: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_size: int  # elements of one head; num_heads x head_size need not be hidden_size
    ffn_size: int
    vocab_size: int
    max_tokens: int  # longest sequence: prompt and output
    rope_theta: float | None  # base of the rotary frequencies; llama only
    norm_eps: float
    tied_embeddings: bool  # the output projection is the token embedding
    biases: bool  # of the linear layers
    dtype: str  # of weights, activations and K/V
    seed: int  # of the random weights
    checkpoint: str | None = None  # local folder or hub name; null: random weights
    tp: int = 1  # tensor-parallel degree
    shard_only: bool = False  # run one of the tp shards, on one device

    def __post_init__(self) -> None:
        """Refuse what no model can be."""
        self._require_choice("family", FAMILIES)
        self._require_choice("dtype", tuple(DTYPE_BYTES))
        for key in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size"):
            self._require(getattr(self, key) > 0, key, "must be at least 1")
        self._require(self.max_tokens > 0, "max_tokens", "must be at least 1")
        self._require(self.tp > 0, "tp", "must be at least 1")
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        if self.family == "llama":
            self._require(self.rope_theta is not None and self.rope_theta > 0, "rope_theta", "must be positive")
            self._require(self.head_size % 2 == 0, "head_size", "must be even: RoPE rotates pairs")
            self._require(not self.biases, "biases", "must be false: linear layers of the llama family have none")
        else:
            self._require(self.num_heads == self.num_kv_heads, "num_kv_heads", "must equal num_heads: OPT is MHA")

    def _require_choice(self, key: str, choices: tuple[str, ...]) -> None:
        self._require(getattr(self, key) in choices, key, f"is not one of: {', '.join(choices)}")

    def _require(self, holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise UserError(f"model.{key}={getattr(self, key)} ({self.name}): {rule}")

    def num_parameters(self) -> int:
        """Parameters of the whole model; tied ones count once."""
        return sum(prod(parameter.shape) for parameter in list_parameters(self))

    def step_parameters(self) -> int:
        """Parameters that a step reads whole and multiplies with each token: all but the tables it picks rows of."""
        return sum(prod(parameter.shape) for parameter in list_parameters(self) if not parameter.gathered)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of the whole model."""
        return self.num_parameters() * DTYPE_BYTES[self.dtype]

    def kv_layout(self) -> KVLayout:
        """Layout of the KV cache of the whole model."""
        return attention_layout(self.num_layers, self.num_kv_heads, self.head_size, self.dtype)

    def shard(self) -> "ModelConfig":
        """One of `tp` tensor-parallel shards: heads, KV heads, feed-forward and vocabulary divided (as in Megatron-LM).

        It has one device's share of the work and the memory. Run alone it gives partial sums: its tokens mean nothing.
        """
        for key in ("num_heads", "num_kv_heads", "ffn_size", "vocab_size"):
            self._require(getattr(self, key) % self.tp == 0, key, f"must be a multiple of model.tp={self.tp}")
        return replace(
            self,
            num_heads=self.num_heads // self.tp,
            num_kv_heads=self.num_kv_heads // self.tp,
            ffn_size=self.ffn_size // self.tp,
            vocab_size=self.vocab_size // self.tp,
            tp=1,
            shard_only=False,
        )

    def on_one_device(self) -> "ModelConfig":
        """The model that one device runs: all of it, or its shard. Raises UserError for tp > 1 without shard_only."""
        if self.tp == 1:
            return self
        self._require(self.shard_only, "tp", "running all shards is not supported; model.shard_only=true runs one")
        self._require(self.checkpoint is None, "checkpoint", "must be null: one shard of a checkpoint means nothing")
        return self.shard()

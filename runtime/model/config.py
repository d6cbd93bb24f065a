"""The architecture that the trainer computes, as config.json states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import ConfigError, require

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
DTYPE_NAMES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16", "float64")
MODEL_TYPES = ("mixtral", "mistral", "llama", "qwen2")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of a decoder, as its Hugging Face config.json states it."""

    model_type: str
    """Hugging Face's name of the family: mixtral, mistral, llama, qwen2."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Inner width of one expert, or of the dense feed-forward layer."""
    vocab_size: int
    num_experts: int = 0
    """Experts a layer; 0 is a dense model."""
    topk: int = 0
    """Experts that each token is routed to; 0 for a dense model."""
    max_position_embeddings: int = 0
    """Longest sequence that the positions were made for; 0 is not stated."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    sliding_window: int | None = None
    """Tokens that attention looks back, the token itself included; None is all of them."""
    qkv_bias: bool = False
    initializer_range: float = 0.02
    dtype: DtypeName = "float32"
    """Type that weights and activations are computed in."""

    def __post_init__(self) -> None:
        where = f"config.json of the {self.model_type} checkpoint"
        require(
            self.model_type in MODEL_TYPES,
            f"{where}: model_type is {self.model_type!r}; the runtime trains {', '.join(MODEL_TYPES)}",
        )
        sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size")
        for name in sizes:
            require(getattr(self, name) >= 1, f"{where}: {name} is {getattr(self, name)}; expected at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{where}: {self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key/value heads",
        )
        require(self.head_dim % 2 == 0, f"{where}: head_dim is {self.head_dim}; rotary embeddings need an even one")
        require(
            self.num_experts == 0 or 1 <= self.topk <= self.num_experts,
            f"{where}: {self.topk} experts a token; expected 1 to {self.num_experts}",
        )
        require(
            self.dtype in DTYPE_NAMES,
            f"{where}: dtype is {self.dtype!r}; expected one of {', '.join(DTYPE_NAMES)}",
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, dtype: DtypeName | None = None) -> ModelConfig:
        """Read the architecture from a Hugging Face config, in the form of transformers v4 or v5.

        Args:
            config: config.json as parsed.
            dtype: compute type instead of the checkpoint's own.

        Returns:
            The architecture.

        Raises:
            ConfigError: a field is missing or says something that the runtime doesn't compute.
        """
        model_type = str(config.get("model_type"))
        _refuse_unsupported(config, model_type)
        try:
            moe = model_type == "mixtral"
            num_heads = int(config["num_attention_heads"])
            hidden_size = int(config["hidden_size"])
            window = config.get("sliding_window")
            if model_type == "qwen2" and not config.get("use_sliding_window", False):
                window = None
            return cls(
                model_type=model_type,
                hidden_size=hidden_size,
                num_layers=int(config["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or hidden_size // num_heads),
                ffn_hidden_size=int(config["intermediate_size"]),
                vocab_size=int(config["vocab_size"]),
                num_experts=int(config["num_local_experts"]) if moe else 0,
                topk=int(config["num_experts_per_tok"]) if moe else 0,
                max_position_embeddings=int(config.get("max_position_embeddings") or 0),
                rope_theta=_rope_theta(config),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                sliding_window=None if window is None else int(window),
                qkv_bias=model_type == "qwen2",
                initializer_range=float(config.get("initializer_range", 0.02)),
                dtype=dtype or config.get("dtype") or config.get("torch_dtype") or "float32",
            )
        except KeyError as missing:
            raise ConfigError(f"config.json of the {model_type} checkpoint has no {missing.args[0]!r}") from None


def _refuse_unsupported(config: Mapping[str, Any], model_type: str) -> None:
    where = f"config.json of the {model_type} checkpoint"
    act = config.get("hidden_act", "silu")
    require(act == "silu", f"{where}: hidden_act is {act!r}; the runtime computes 'silu' (SwiGLU)")
    for name in ("attention_bias", "mlp_bias"):
        require(not config.get(name), f"{where}: {name} is true; the runtime computes these projections without bias")
    require(
        not config.get("attention_dropout"),
        f"{where}: attention_dropout is {config.get('attention_dropout')}; the runtime trains without dropout",
    )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{where}: rope_type is {kind!r}; the runtime computes 'default'")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies: transformers v5 keeps it in rope_parameters, v4 at the top level."""
    value = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    return 10000.0 if value is None else float(value)

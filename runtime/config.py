"""What a training run is made of: frozen, validated dataclasses without devices or process groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moeconv.errors import MoeconvError

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
RecomputeGranularity = Literal["none", "selective", "full"]

DTYPE_NAMES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16", "float64")
MODEL_TYPES = ("mixtral", "mistral", "llama", "qwen2")


class ConfigError(MoeconvError):
    """Options of a training run that are wrong in themselves, disagree, or can't be honoured."""


def require(condition: bool, message: str) -> None:
    """Raise the error that a user reads unless a condition holds.

    Args:
        condition: what must be true.
        message: what was found, what was expected and what to do.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError(message)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks divide the model; the data-parallel degrees follow from the world size."""

    tp: int = 1
    """Tensor-parallel degree of attention, embeddings and dense layers."""
    sp: bool = False
    """Sequence parallelism: activations between the tensor-parallel regions are split over tp."""
    pp: int = 1
    vpp: int = 1
    """Model chunks (virtual stages) a pipeline rank."""
    pp_layers: tuple[int, ...] | None = None
    """Layers of each of the pp * vpp stages, in the order of the model; None splits evenly."""
    ep: int = 1
    etp: int = 0
    """Tensor-parallel degree inside an expert; 0 takes tp."""
    cp: int = 1
    use_distributed_optimizer: bool = False
    """Gradients and optimizer state are sharded over data parallel; parameters stay whole during the step."""
    fully_shard: bool = False
    """Parameters are sharded over data parallel too, and gathered layer by layer."""
    pp_schedule: PipelineSchedule = "1f1b"

    def __post_init__(self) -> None:
        if self.etp == 0:
            object.__setattr__(self, "etp", self.tp)
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp"):
            require(getattr(self, name) >= 1, f"parallel degree {name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with fp32 master weights and moments."""

    lr: float = 1e-4
    """Peak learning rate; the trainer's schedule sets the rate of each step."""
    weight_decay: float = 0.01
    """Decoupled; norms, biases and other one-dimensional parameters are not decayed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 doesn't clip."""
    skip_nonfinite: bool = False
    """A step with a NaN or inf loss or gradient is left out; False stops the run with a report."""
    initial_loss_scale: float = 2.0**32
    """fp16 only: where dynamic loss scaling starts."""
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    """fp16 only: steps without overflow before the scale doubles."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"--lr is {self.lr}; expected at least 0")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}; expected at least 0")
        require(self.clip_grad >= 0, f"--clip-grad is {self.clip_grad}; expected at least 0")
        for flag, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"{flag} is {beta}; expected 0 <= beta < 1")
        require(self.adam_eps > 0, f"--adam-eps is {self.adam_eps}; expected more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: RecomputeGranularity = "none"
    modules: tuple[str, ...] = ("moe_act", "layernorm", "core_attn")
    """selective only: the parts that are computed again."""
    num_layers: int = 0
    """full only: layers of each stage that are computed again, from the first; 0 is all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The sizes of a step and the length of a run."""

    seq_length: int
    micro_batch_size: int = 1
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = 0
    """Sequences of one optimizer step over all data-parallel ranks; 0 is one micro-batch on each."""
    train_iters: int = 0
    seed: int = 1234
    eval_interval: int = 0
    """Iterations between evaluations on the validation split; 0 evaluates at the end only."""
    eval_iters: int = 0
    """Global batches of an evaluation; 0 doesn't evaluate, -1 takes the whole split once."""
    save_interval: int = 0
    """Iterations between saves; 0 saves at the end only."""
    log_interval: int = 1

    def __post_init__(self) -> None:
        require(self.seq_length >= 1, f"--seq-length is {self.seq_length}; expected at least 1")
        require(self.micro_batch_size >= 1, f"--micro-batch-size is {self.micro_batch_size}; expected at least 1")
        require(self.log_interval >= 1, f"--log-interval is {self.log_interval}; expected at least 1")
        require(self.eval_iters >= -1, f"--eval-iters is {self.eval_iters}; expected -1 (the whole split) or more")
        for name in ("global_batch_size", "train_iters", "eval_interval", "save_interval"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} is {value}; expected at least 0")

    def num_microbatches(self, dp: int) -> int:
        """Forward passes that each data-parallel rank makes in one optimizer step.

        Args:
            dp: data-parallel degree.

        Returns:
            The number of micro-batches of one rank.

        Raises:
            ConfigError: the global batch isn't a multiple of what one pass over all ranks takes.
        """
        one_pass = self.micro_batch_size * dp
        total = self.global_batch_size or one_pass
        require(
            total % one_pass == 0,
            f"--global-batch-size {total} is not a multiple of --micro-batch-size {self.micro_batch_size} times the "
            f"data-parallel degree {dp}; take a multiple of {one_pass}",
        )
        return total // one_pass

"""The optimizer's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from runtime.flag import check_fields, flag

EMA = "ema"
"""The state that is the mean of the weights: on disk `optimizer.ema.<tensor>`."""


PIECE = 1 << 24
"""Elements of the optimizer's state that travel together: 64 MB of masters, long enough for the link and short beside a step."""
BUFFERS = 4
"""Pieces on the device: one that fills, one that is updated, one that empties, and one to spare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with fp32 master weights and moments."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam: AdamW, whose weight decay is decoupled. muon: torch's Muon for the matrices of the layers, each expert's and
    each of query, key and value by itself, and AdamW for the rest; it needs whole matrices on each rank."""
    muon_momentum: float = flag(0.95, at_least=0, below=1)
    """Muon only: decay of the running mean of the gradient."""
    muon_num_ns_steps: int = flag(5, at_least=1, below=100)
    """Muon only: Newton-Schulz iterations of the orthogonalisation."""
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon only: size of an update. match_rms_adamw: that of AdamW's, so that both have the same --lr; original: that of a
    matrix with singular values of 1, times the root of rows over columns where there are more rows."""
    lr: float = flag(1e-4, at_least=0)
    """Peak learning rate; the schedule sets the rate of each step."""
    decoupled_lr: float | None = flag(None, at_least=0)
    """Peak learning rate of the embedding and the output head, instead of --lr."""
    lr_scale: tuple[str, ...] = flag((), metavar="GLOB=FACTOR")
    """Factors on the learning rate of the tensors whose Hugging Face names match, such as '*.gate.weight=0.1' for
    routers; where several match a tensor, the last does it."""
    freeze: tuple[str, ...] = flag((), metavar="GLOB")
    """Tensors that stay as they are, by their Hugging Face names ('*.experts.0.*' '*embed_tokens*'): no gradients, no
    masters, no optimizer state."""
    weight_decay: float = flag(0.01, at_least=0)
    """Decoupled; norms, biases and other one-dimensional parameters are not decayed."""
    no_weight_decay: tuple[str, ...] = flag((), metavar="GLOB")
    """Further tensors without weight decay, by their Hugging Face names."""
    adam_beta1: float = flag(0.9, at_least=0, below=1)
    """Decay of the running mean of the gradient."""
    adam_beta2: float = flag(0.999, at_least=0, below=1)
    """Decay of the running mean of the squared gradient."""
    adam_eps: float = flag(1e-8, above=0)
    """Added to the root of the mean squared gradient, so that the division is safe."""
    master_weights: Literal["fp32", "remainder"] = "fp32"
    """remainder: bf16 only, keep of each fp32 master the 16 bits that its bf16 weight lacks: 2 bytes a parameter less, and the
    same bits in every update (as Transformer Engine's store_param_remainders). Checkpoints hold fp32 masters either way."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the moments: 4 bytes a parameter less, rounded stochastically."""
    main_grads_dtype: Literal["fp32", "bf16"] = flag(
        "fp32", shorthands={"--grad-reduce-in-bf16": "bf16", "--accumulate-allreduce-grads-in-fp32": "fp32"}
    )
    """bf16: with --bf16, sum and reduce gradients in bf16, 2 bytes a parameter less. One micro-batch a step loses nothing by the
    sum; each further one, and each rank of a reduction, is rounded onto it. With --fully-shard reductions alone are in bf16."""
    optimizer_cpu_offload: bool = False
    """Keep master weights and moments in page-locked memory of the host: each step brings them to the GPU in pieces, updates
    them there and takes them back, with the same bits as without. A GPU then holds weights and gradients alone (with
    --fully-shard the masters, too)."""
    optimizer_offload_fraction: float = flag(1.0, above=0, at_most=1)
    """--optimizer-cpu-offload only: share of a rank's elements whose state is on the host; the rest stays on the GPU."""
    ema_decay: float | None = flag(None, above=0, below=1)
    """Keep an exponential mean of the weights, of which each step leaves this share (such as 0.999): 4 bytes a parameter,
    sharded as the optimizer is; `moeconv export-hf --weights ema` exports it."""
    clip_grad: float = flag(1.0, at_least=0)
    """Largest global gradient norm; 0 doesn't clip."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or inf loss or gradient does: stop the run with a report, or skip the step. fp16 always skips."""
    initial_loss_scale: float = flag(2.0**32, above=0)
    """fp16 only: where dynamic loss scaling starts."""
    min_loss_scale: float = flag(1.0, above=0)
    """fp16 only: the smallest loss scale."""
    loss_scale_window: int = flag(1000, at_least=1)
    """fp16 only: steps without overflow before the scale doubles."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def storage(self) -> dict[str, Any]:
        """Types and places of masters and gradients, as the stores of `runtime.parallel` take them."""
        return {
            "host_share": self.on_host,
            "remainders": self.master_weights == "remainder",
            "bf16_grads": self.main_grads_dtype == "bf16",
        }

    @property
    def on_host(self) -> float:
        """Share of a rank's elements whose masters and states are in the host's memory."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

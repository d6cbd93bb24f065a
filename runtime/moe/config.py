"""The options of a mixture-of-experts layer, validated before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeconv.errors import MoeconvError

AUX_LOSS_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
LOAD_BALANCING_TYPES = (*AUX_LOSS_TYPES, "sinkhorn", "expert_choice", "none")
AUX_LOSS_MODES = ("megatron", "hf", "switch")
SCORE_FUNCTIONS = ("softmax", "sigmoid")
DROP_POLICIES = ("probs", "position")
DISPATCHERS = ("alltoall", "allgather")
GEMM_BACKENDS = ("auto", "hopper", "torch", "grouped_gemm", "te", "loop")
ROUTER_DTYPES = ("fp32", "fp64", "bf16")
FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise")


class MoEConfigError(MoeconvError):
    """Options of the mixture-of-experts layer that are out of range or exclude each other."""


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MoEConfigError(f"{field} is {value!r}; expected one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """What a MoE layer computes; sizes of the model and process groups are given to the layer beside it.

    Raises:
        MoEConfigError: a value is out of range, or options exclude each other; names the fields and the remedy.
    """

    num_experts: int
    """Number of routed experts."""
    topk: int = 2
    """Experts that each token is routed to."""
    load_balancing: tuple[str, ...] = ("aux_loss",)
    """One or more of aux_loss, seq_aux_loss, global_aux_loss; or alone: sinkhorn, expert_choice, none."""
    aux_loss_coeff: tuple[float, ...] = (0.0,)
    """Scaling of each auxiliary loss of load_balancing; one value serves all."""
    aux_loss_mode: str = "megatron"
    """megatron: per layer, 1.0 is balanced; hf: layers pooled, not divided by topk; switch: first choices."""
    z_loss_coeff: float = 0.0
    """Scaling of the router z-loss; 0 turns it off."""
    input_jitter_eps: float = 0.0
    """Router input is multiplied by uniform noise in [1 - eps, 1 + eps] in training."""
    score_function: str = "softmax"
    """softmax or sigmoid."""
    pre_softmax: bool = False
    """Softmax over all experts before the top-k instead of over the chosen ones after it."""
    normalize_topk: bool | None = None
    """Scale a token's weights to sum 1; None: as Megatron does (not for pre_softmax, always otherwise)."""
    num_groups: int | None = None
    """Groups of experts for group-limited top-k."""
    group_topk: int | None = None
    """Groups that a token may use."""
    topk_scaling_factor: float | None = None
    """Factor on the routing weights."""
    enable_expert_bias: bool = False
    """Auxiliary-loss-free balancing: a bias per expert takes part in the choice but not in the weights."""
    expert_bias_update_rate: float = 1e-3
    """Step of the expert bias after each global batch."""
    expert_bias_centered: bool = False
    """Subtract the mean of the bias step, so that biases keep their sum."""
    router_dtype: str = "fp32"
    """Precision of logits, softmax and routing weights: fp32, fp64 or bf16."""
    capacity_factor: float | None = None
    """Rows per expert relative to an even split; None: dropless. Also the capacity of expert_choice."""
    pad_to_capacity: bool = False
    """Fill every expert up to its capacity, so that all sizes are static."""
    drop_policy: str = "probs"
    """probs: keep the most probable tokens of an expert; position: keep the earliest."""
    dispatcher: str = "alltoall"
    """How tokens reach their experts' ranks: alltoall or allgather."""
    gemm_backend: str = "auto"
    """Grouped GEMM: hopper, torch, grouped_gemm, te, loop, or auto (the fastest that is installed)."""
    permute_fusion: bool = True
    """Use the fused kernels for permutation, activation and combine where a GPU allows it."""
    shared_expert_intermediate_size: int | None = None
    """Width of an expert that sees every token; None: no shared expert."""
    shared_expert_gate: bool = False
    """Multiply the shared expert by a sigmoid gate of the token."""
    recompute_layer: bool = False
    """Recompute dispatch and experts in the backward pass; the routing is kept, not recomputed."""
    fp8_format: str | None = None
    """FP8 of the te backend: e4m3 or hybrid; None: no FP8."""
    fp8_recipe: str = "delayed"
    """Scaling of FP8: delayed, tensorwise (current) or blockwise."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_balancing()
        self._check_combinations()

    def _check_ranges(self) -> None:
        if self.num_experts < 1:
            raise MoEConfigError(f"num_experts is {self.num_experts}; expected at least 1")
        if not 1 <= self.topk <= self.num_experts:
            raise MoEConfigError(f"topk is {self.topk}; expected 1 to num_experts ({self.num_experts})")
        for field in ("z_loss_coeff", "input_jitter_eps", "expert_bias_update_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise MoEConfigError(f"{field} is {value}; expected a finite number of at least 0")
        if self.input_jitter_eps >= 1:
            raise MoEConfigError(f"input_jitter_eps is {self.input_jitter_eps}; expected less than 1")
        if self.capacity_factor is not None and not (math.isfinite(self.capacity_factor) and self.capacity_factor > 0):
            raise MoEConfigError(f"capacity_factor is {self.capacity_factor}; expected a positive number")
        width = self.shared_expert_intermediate_size
        if width is not None and width < 1:
            raise MoEConfigError(f"shared_expert_intermediate_size is {width}; expected at least 1")
        _choice("score_function", self.score_function, SCORE_FUNCTIONS)
        _choice("aux_loss_mode", self.aux_loss_mode, AUX_LOSS_MODES)
        _choice("router_dtype", self.router_dtype, ROUTER_DTYPES)
        _choice("drop_policy", self.drop_policy, DROP_POLICIES)
        _choice("dispatcher", self.dispatcher, DISPATCHERS)
        _choice("gemm_backend", self.gemm_backend, GEMM_BACKENDS)
        _choice("fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        if self.fp8_format is not None:
            _choice("fp8_format", self.fp8_format, FP8_FORMATS)

    def _check_balancing(self) -> None:
        kinds = self.load_balancing
        if not kinds or len(set(kinds)) != len(kinds):
            raise MoEConfigError(f"load_balancing is {kinds}; expected one or more different types")
        for kind in kinds:
            _choice("load_balancing", kind, LOAD_BALANCING_TYPES)
        if len(kinds) > 1 and not set(kinds) <= set(AUX_LOSS_TYPES):
            raise MoEConfigError(f"load_balancing {kinds}: only {', '.join(AUX_LOSS_TYPES)} can be combined")
        if len(self.aux_loss_coeff) not in (1, len(kinds)):
            raise MoEConfigError(
                f"aux_loss_coeff has {len(self.aux_loss_coeff)} values for {len(kinds)} load_balancing types; "
                "give one, or one for each"
            )
        if not all(math.isfinite(coeff) and coeff >= 0 for coeff in self.aux_loss_coeff):
            raise MoEConfigError(f"aux_loss_coeff is {self.aux_loss_coeff}; expected finite numbers of at least 0")
        if self.aux_loss_mode != "megatron" and kinds not in (("aux_loss",), ("none",)):
            raise MoEConfigError(
                f"aux_loss_mode {self.aux_loss_mode!r} knows only load_balancing aux_loss, got {kinds}"
            )
        if kinds[0] in ("sinkhorn", "expert_choice"):
            self._check_alone(kinds[0])

    def _check_alone(self, kind: str) -> None:
        if any(self.aux_loss_coeff):
            raise MoEConfigError(f"load_balancing {kind} balances by itself: aux_loss_coeff must be 0")
        if self.enable_expert_bias:
            raise MoEConfigError(f"load_balancing {kind} balances by itself: turn enable_expert_bias off")
        if self.num_groups is not None:
            raise MoEConfigError(f"load_balancing {kind} doesn't choose by groups: leave num_groups out")
        if kind == "sinkhorn" and self.capacity_factor is not None:
            raise MoEConfigError("load_balancing sinkhorn doesn't drop tokens: leave capacity_factor out")
        if kind == "expert_choice" and self.pad_to_capacity:
            raise MoEConfigError("load_balancing expert_choice always fills its experts: turn pad_to_capacity off")

    def _check_combinations(self) -> None:
        if (self.num_groups is None) != (self.group_topk is None):
            raise MoEConfigError("num_groups and group_topk go together: give both or neither")
        if self.num_groups is not None and self.group_topk is not None:
            self._check_groups(self.num_groups, self.group_topk)
        if self.enable_expert_bias and self.score_function != "sigmoid":
            raise MoEConfigError("enable_expert_bias adds to scores in [0, 1]: it needs score_function sigmoid")
        if self.pre_softmax and self.score_function != "softmax":
            raise MoEConfigError("pre_softmax needs score_function softmax")
        if self.normalize_topk is False and self.score_function == "softmax" and not self.pre_softmax:
            raise MoEConfigError("a softmax over the chosen experts sums to 1: normalize_topk off needs pre_softmax")
        if self.pad_to_capacity and self.capacity_factor is None:
            raise MoEConfigError("pad_to_capacity needs a capacity_factor")
        if self.shared_expert_gate and self.shared_expert_intermediate_size is None:
            raise MoEConfigError("shared_expert_gate needs shared_expert_intermediate_size")
        if self.fp8_format is not None and self.gemm_backend not in ("te", "auto"):
            raise MoEConfigError(f"fp8_format needs gemm_backend te, got {self.gemm_backend!r}")

    def _check_groups(self, num_groups: int, group_topk: int) -> None:
        if num_groups < 1 or self.num_experts % num_groups:
            raise MoEConfigError(f"num_groups ({num_groups}) doesn't divide num_experts ({self.num_experts})")
        if not 1 <= group_topk <= num_groups:
            raise MoEConfigError(f"group_topk is {group_topk}; expected 1 to num_groups ({num_groups})")
        if self.topk % group_topk or self.topk // group_topk > self.num_experts // num_groups:
            raise MoEConfigError(
                f"topk ({self.topk}) must be a multiple of group_topk ({group_topk}) with at most "
                f"{self.num_experts // num_groups} experts of each group"
            )

    @property
    def renormalize(self) -> bool:
        """Whether a token's weights are scaled to sum 1."""
        if self.normalize_topk is not None:
            return self.normalize_topk
        return self.topk > 1 if self.score_function == "sigmoid" else not self.pre_softmax

    @property
    def aux_losses(self) -> tuple[tuple[str, float], ...]:
        """The auxiliary losses with a coefficient above 0, as (type, coefficient)."""
        coeffs = self.aux_loss_coeff * (len(self.load_balancing) if len(self.aux_loss_coeff) == 1 else 1)
        pairs = zip(self.load_balancing, coeffs, strict=True)
        return tuple((kind, coeff) for kind, coeff in pairs if kind in AUX_LOSS_TYPES and coeff > 0)

    @property
    def topk_router(self) -> bool:
        """Whether tokens choose experts by score (not sinkhorn, not expert choice)."""
        return self.load_balancing[0] not in ("sinkhorn", "expert_choice")

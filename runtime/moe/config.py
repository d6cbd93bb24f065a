"""The options of a mixture-of-experts layer, validated before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeconv.families.compute import Router
from runtime.errors import ConfigError
from runtime.flag import check_fields, flag, flag_name

LoadBalancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "expert_choice", "none"]
AuxLossMode = Literal["megatron", "hf", "switch"]
DropPolicy = Literal["probs", "position"]
Dispatcher = Literal["alltoall", "allgather"]
GemmBackend = Literal["auto", "hopper", "torch", "grouped_gemm", "te", "loop"]
RouterDtype = Literal["fp32", "fp64", "bf16"]
AUX_LOSS_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


class MoEConfigError(ConfigError):
    """Options of the mixture-of-experts layer that are out of range or exclude each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """What a MoE layer computes; sizes of the model and process groups are given to the layer beside it.

    Raises:
        MoEConfigError: a value is out of range, or options exclude each other; names the flags and the remedy.
    """

    router: Router
    """What the model's router computes: the family says it, a run can't choose."""
    load_balancing: tuple[LoadBalancing, ...] = flag(("aux_loss",), "--moe-router-load-balancing-type")
    """One or more of aux_loss, seq_aux_loss, global_aux_loss; or alone: sinkhorn, expert_choice, none."""
    aux_loss_coeff: tuple[float, ...] = flag((0.0,), "--moe-aux-loss-coeff", at_least=0)
    """Scaling of each auxiliary loss of the balancing; one value serves all. 1e-2 is a good start."""
    aux_loss_mode: AuxLossMode = flag("megatron", "--moe-aux-loss-mode")
    """megatron: per layer, 1.0 is balanced; hf: layers pooled, not divided by topk; switch: first choices."""
    z_loss_coeff: float = flag(0.0, "--moe-z-loss-coeff", at_least=0)
    """Scaling of the router z-loss; 0 turns it off. 1e-3 is a good start."""
    input_jitter_eps: float = flag(0.0, "--moe-input-jitter-eps", at_least=0, below=1)
    """Router input is multiplied by uniform noise in [1 - eps, 1 + eps] in training."""
    enable_expert_bias: bool = flag(False, "--moe-router-enable-expert-bias")
    """Auxiliary-loss-free balancing: a bias per expert takes part in the choice but not in the weights."""
    expert_bias_update_rate: float = flag(1e-3, "--moe-router-bias-update-rate", at_least=0)
    """Step of the expert bias after each global batch."""
    force_load_balancing: bool = flag(False, "--moe-router-force-load-balancing")
    """Send each rank's tokens to all experts in turn, whatever the router says: to measure speed, not to train."""
    expert_bias_centered: bool = False
    """Subtract the mean of the bias step, so that biases keep their sum."""
    router_dtype: RouterDtype = flag("fp32", "--moe-router-dtype")
    """Precision of logits, softmax and routing weights."""
    capacity_factor: float | None = flag(
        None, "--moe-expert-capacity-factor", shorthands={"--moe-token-dropping": 1.0}, yields=True, above=0
    )
    """Drop an expert's tokens above so many times an even split; without it none is dropped. Also of expert_choice."""
    pad_to_capacity: bool = flag(False, "--moe-pad-expert-input-to-capacity")
    """Fill every expert up to its capacity, so that all sizes are static."""
    drop_policy: DropPolicy = flag("probs", "--moe-token-drop-policy")
    """probs: keep the most probable tokens of an expert; position: keep the earliest."""
    dispatcher: Dispatcher = flag("alltoall", "--moe-token-dispatcher-type")
    """How tokens reach their experts' ranks."""
    gemm_backend: GemmBackend = flag("auto", "--moe-grouped-gemm-backend")
    """Kernel of the experts' grouped GEMMs; auto is the fastest that is installed and takes the sizes."""
    permute_fusion: bool = flag(True, "--moe-permute-fusion")
    """Use the fused kernels for permutation, activation and combine where a GPU allows it."""
    recompute_layer: bool = flag(False, "--moe-layer-recompute")
    """Recompute dispatch and experts in the backward pass; the routing is kept, not recomputed."""

    def __post_init__(self) -> None:
        check_fields(self, MoEConfigError)
        self._check_balancing()
        self._check_combinations()

    def _check_balancing(self) -> None:
        kinds, named = self.load_balancing, f"{_flag('load_balancing')} {' '.join(self.load_balancing)}"
        coeff = f"{_flag('aux_loss_coeff')} {' '.join(map(str, self.aux_loss_coeff))}"
        if not kinds or len(set(kinds)) != len(kinds):
            raise MoEConfigError(f"{named}: expected one or more different types")
        if len(kinds) > 1 and not set(kinds) <= set(AUX_LOSS_TYPES):
            raise MoEConfigError(f"{named}: only {', '.join(AUX_LOSS_TYPES)} can be combined")
        if len(self.aux_loss_coeff) not in (1, len(kinds)):
            raise MoEConfigError(
                f"{coeff} has {len(self.aux_loss_coeff)} values for {named}; give one, or one for each"
            )
        if self.aux_loss_mode != "megatron" and kinds not in (("aux_loss",), ("none",)):
            raise MoEConfigError(f"{_flag('aux_loss_mode')} {self.aux_loss_mode} knows only aux_loss, got {named}")
        if kinds == ("none",) and any(self.aux_loss_coeff):
            raise MoEConfigError(f"{named} has no loss to scale: leave {coeff} out, or balance by aux_loss")
        if kinds[0] in ("sinkhorn", "expert_choice"):
            self._check_alone(named, coeff)

    def _check_alone(self, named: str, coeff: str) -> None:
        kind = self.load_balancing[0]
        if any(self.aux_loss_coeff):
            raise MoEConfigError(f"{named} balances by itself: leave {coeff} out")
        if self.enable_expert_bias:
            raise MoEConfigError(f"{named} balances by itself: leave {_flag('enable_expert_bias')} out")
        if self.force_load_balancing:
            raise MoEConfigError(f"{named} balances by itself: leave {_flag('force_load_balancing')} out")
        if self.router.groups > 1:
            raise MoEConfigError(f"{named} doesn't choose by groups, as this model's router does: take another")
        if kind == "sinkhorn" and self.capacity_factor is not None:
            raise MoEConfigError(f"{named} doesn't drop tokens: leave {_flag('capacity_factor')} out")
        if kind == "expert_choice" and self.pad_to_capacity:
            raise MoEConfigError(f"{named} always fills its experts: leave {_flag('pad_to_capacity')} out")

    def _check_combinations(self) -> None:
        if self.enable_expert_bias and self.router.score != "sigmoid":
            raise MoEConfigError(
                f"{_flag('enable_expert_bias')} adds to scores in [0, 1]: it needs a router of sigmoids, and this model's is a softmax"
            )
        if self.pad_to_capacity and self.capacity_factor is None:
            raise MoEConfigError(f"{_flag('pad_to_capacity')} needs {_flag('capacity_factor')}")

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return self.router.experts

    @property
    def topk(self) -> int:
        """Experts that each token is routed to."""
        return self.router.top_k

    @property
    def has_bias(self) -> bool:
        """Whether a bias takes part in the choice: one that the model stores, or one that balances this run."""
        return self.router.bias or self.enable_expert_bias

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


def _flag(name: str) -> str:
    return flag_name(MoEConfig, name)

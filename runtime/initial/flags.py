"""From architecture flags to the config.json of a new model: the first family that holds what Megatron would build of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.megatron.args import RunArgs, shown
from moeconv.megatron.described import find_config
from runtime.errors import ConfigError

# What the trainer's models have, whether a flag says it or not.
_ALWAYS = {"normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False}
_EXPERT_BIAS = "moe_router_enable_expert_bias"


class FlagArgs(RunArgs):
    """Megatron's arguments as flags gave them: messages name flags."""

    def wrong(self, name: str, expected: str) -> MappingError:
        """Make the error of a flag that means nothing."""
        return MappingError(f"--{name.replace('_', '-')} is {shown(self.values.get(name))}; expected {expected}")


def config_from_flags(stated: Mapping[str, Any], dtype: str, *, expert_bias: bool) -> dict[str, Any]:
    """Make the config.json of the model that flags describe.

    Args:
        stated: Megatron's argument -> its value, for what flags say of the model; as many as are needed.
        dtype: the weights' torch dtype.
        expert_bias: whether a bias of the router's choice is trained. A family that stores one is taken if there is one;
            else the trainer keeps it in its own file.

    Returns:
        The config of the first family that holds this model.

    Raises:
        MoeconvError: a flag means nothing, or no family holds the model; says what each can't hold.
    """
    args = dict(stated) | _ALWAYS
    if "num_query_groups" in args:
        args["group_query_attention"] = True
    if "ffn_hidden_size" not in args:
        args["ffn_hidden_size"] = _feed_forward_width(FlagArgs(args))
    # A stored bias of zeros that nothing trains changes no choice: it is what some families must have.
    tries = (expert_bias, not expert_bias) if args.get("num_experts") else (False,)
    found = [find_config(FlagArgs(args | {_EXPERT_BIAS: bias}), dtype) for bias in tries]
    config = next((config for config, _ in found if config is not None), None)
    if config is None:
        reasons = "; ".join(found[0][1])
        raise ConfigError(
            f"no family of models holds what the architecture flags describe. What each can't hold: {reasons}. Change the "
            "flags, or name a config.json with --init-config"
        )
    return config


def _feed_forward_width(args: RunArgs) -> int:
    """Give Megatron's default width of a SwiGLU layer: as many weights as 4 times the hidden size without a gate.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/arguments.py (validate_args)
    """
    return max(int((4 * args.whole("hidden_size") * 2 / 3) / 64) * 64, 64)

"""Which layouts a model can have: what `runtime.settings.check` refuses in words is an error of the program that builds an engine."""

from __future__ import annotations

from runtime.moe.config import MoEConfig
from runtime.parallel.degrees import ParallelConfig


def assert_combination(parallel: ParallelConfig, moe: MoEConfig | None) -> None:
    """Refuse what can't be combined.

    Args:
        parallel: the layout.
        moe: options of the MoE layers; None for a dense model.

    Raises:
        AssertionError: names what doesn't go together.
    """
    assert parallel.tp == 1 or parallel.ep == 1 or parallel.sp, "ep and tp need sp"
    assert not parallel.fully_shard or parallel.pp == 1 or parallel.pp_schedule != "zero-bubble", "fsdp, zero-bubble"
    assert parallel.pp > 1 or parallel.vpp == 1, "vpp needs pp"
    assert not parallel.overlap_exchange or (parallel.pp == 1 and not parallel.fully_shard), "pairs need whole layers"
    whole = parallel.pp * parallel.tp * parallel.cp == 1
    assert whole or moe is None or moe.aux_loss_mode != "hf" or not moe.aux_losses, (
        "aux_loss_mode hf needs pp, tp, cp 1"
    )

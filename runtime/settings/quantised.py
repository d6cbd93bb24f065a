"""A run over a quantised release: its weights are read as plain numbers, or its FP8 blocks as they are."""

from __future__ import annotations

import dataclasses

from moeconv.quant.view import PlainView, holds_fp8_blocks, plain_view
from runtime.settings.check import check_degrees
from runtime.settings.flags import Given
from runtime.settings.origin import Origin
from runtime.settings.run import RunConfig


def with_plain_numbers(origin: Origin, given: Given) -> Origin:
    """Read a quantised release as plain numbers where the run quantises its base itself.

    Args:
        origin: where the run starts.
        given: what the command line says.

    Returns:
        The origin with such a view of its model, or as it is.

    Raises:
        MappingError: no cast of its numbers is known.
    """
    record = origin.adapters.adapter if origin.adapters is not None else None
    wanted = given.of("lora").get("quantize_base") or (record.quantize_base if record is not None else None)
    scheme = origin.checkpoint.model.scheme
    if wanted is None or not origin.checkpoint.model.quantised or scheme is None:
        return origin
    view = plain_view(origin.checkpoint)
    direct = wanted == "fp8" and holds_fp8_blocks(origin.checkpoint.model)
    note = (
        f"{scheme.name} weights are taken as they are stored"
        if direct
        else f"{scheme.name} weights become {wanted}: rounded anew"
    )
    return dataclasses.replace(origin, checkpoint=view, notes=(*origin.notes, note))


def check_stored_blocks(run: RunConfig, origin: Origin) -> None:
    """Refuse degrees that cut through the blocks of FP8 weights which are taken as they are stored.

    Args:
        run: the settings.
        origin: where it starts.

    Raises:
        ConfigError: names the flag and what fits.
    """
    base = origin.checkpoint
    if isinstance(base, PlainView) and run.lora.quantize_base == "fp8" and holds_fp8_blocks(base.stored.model):
        check_degrees(run.parallel, base.stored.model)

"""Runs that train adapters: their saves hold what training changes, and are loaded over the model that they belong to."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moeconv.checkpoint import Checkpoint
from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import Model
from moeconv.io.adapter import AdapterRecord
from moeconv.layout.rect import Rect
from runtime.checkpoint.rectangles import Read
from runtime.errors import require
from runtime.model.lora import LoraConfig


def source_of_saves(
    base: Checkpoint, model: AdaptedModel, config: LoraConfig, fingerprint: str, path: Path
) -> Checkpoint:
    """Give what the saves of a run of adapters come from: the base's config and tokenizer, and none of its weights.

    Args:
        base: the model that is trained, opened.
        model: with its adapters.
        config: of the adapters.
        fingerprint: the base's.
        path: where the base is.

    Returns:
        A checkpoint to save as.
    """
    assert config.alpha is not None
    record = AdapterRecord(
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        dropout=config.dropout,
        base=fingerprint,
        base_path=str(path.absolute()),
        quantize_base=config.quantize_base,
        double_quant=config.double_quant,
    )
    return replace(base, model=model.by_itself(), tensors={}, pieces={}, checksums={}, ops={}, adapter=record)


def over(base: Read, own: Read, held: Container[str]) -> Read:
    """Read what training changes from one place, and the rest from another.

    Args:
        base: reads the model.
        own: reads what training changes.
        held: the names that `own` has.

    Returns:
        The reader.
    """

    def read(name: str, rect: Rect) -> npt.NDArray[Any]:
        return own(name, rect) if name in held else base(name, rect)

    return read


def as_saved(saved: Checkpoint, base: Model) -> tuple[AdaptedModel, LoraConfig]:
    """Give the model and the settings that a save of adapters was trained with.

    Args:
        saved: the save.
        base: the model that it belongs to.
    """
    record, held = saved.adapter, saved.model
    assert record is not None
    assert isinstance(held, AdaptedModel)
    config = LoraConfig(
        rank=record.rank,
        alpha=record.alpha,
        rslora=record.rslora,
        dropout=record.dropout,
        quantize_base=record.quantize_base,
        double_quant=record.double_quant,
    )
    return AdaptedModel.of(base, record.rank, held.adapted, held.whole), config


def check_adapters(
    model: AdaptedModel | None, config: LoraConfig, saved: Checkpoint | None, *, own: bool, where: Path
) -> None:
    """Refuse to go on with adapters other than those that a run asks for.

    Args:
        model: of the run; None where it trains no adapters.
        config: of the run's adapters.
        saved: the save to go on from; None for none.
        own: whether the run goes on from its own folder.
        where: the checkpoint that it goes on from.

    Raises:
        ConfigError: they differ; says in what, and what to give.
    """
    if saved is None:
        require(
            model is None or not own,
            f"--lora-rank {config.rank}: {where} is a run's that trained the model itself: give another --save, and --load {where}",
        )
        return
    record, held = saved.adapter, saved.model
    assert record is not None
    assert isinstance(held, AdaptedModel)
    flags = f"--lora-rank {record.rank} --lora-alpha {record.alpha:g}" + (" --lora-rslora" if record.rslora else "")
    if model is None:
        require(
            False,
            f"{where} holds adapters: go on with {flags} and its --lora-targets, or make a model of it with `moeconv merge`",
        )
        return
    if record.quantize_base is not None:
        flags += f" --quantize-base {record.quantize_base}" + (" --double-quant" if record.double_quant else "")
    elif config.quantize_base is not None:
        flags += ", without --quantize-base"
    same = all(
        getattr(record, name) == getattr(config, name)
        for name in ("rank", "alpha", "rslora", "quantize_base", "double_quant")
    )
    require(same, f"{where} holds adapters of {flags}; give these, or another --save for others")
    for flag, mine, theirs in (("targets", model.adapted, held.adapted), ("also-train", model.whole, held.whole)):
        other = sorted(mine ^ theirs)
        if other:
            has, lacks = (
                ("the run's flags name", "it doesn't hold")
                if other[0] in mine
                else ("it holds", "the flags don't name")
            )
            require(
                False,
                f"--lora-{flag}: {where} was trained with others: {has} {other[0]}, which {lacks}; give the same again",
            )

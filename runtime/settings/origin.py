"""The checkpoint that a run starts from: its own latest one, or what --load names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.base import Model
from runtime.checkpoint import folder as folders
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.errors import require
from runtime.settings.resolved import RUN_FILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a run starts."""

    path: Path
    checkpoint: Checkpoint
    own: bool
    """The run itself wrote it earlier: everything is taken from it, whatever the flags leave out of --load."""
    notes: tuple[str, ...] = ()
    """Lines for the log: how it came to be this one."""


def find_origin(load: Path, save: Path | None, step: int | None = None) -> Origin:
    """Find the checkpoint that a run starts from: its own latest one if it has saved already, else what it is told.

    Args:
        load: what --load says.
        save: what --save says.
        step: what --ckpt-step says: the iteration, instead of the latest.

    Returns:
        The checkpoint, opened; no tensor has been read.

    Raises:
        MoeconvError: there is none, it can't be read, or --save holds a run of another model than --load.
    """
    mine = folders.latest(save) if save is not None else None
    if step is not None:
        path = folders.at_step(save if save is not None and mine is not None else load, step).resolve()
    else:
        path = mine or folders.resolve(load)
    try:
        origin = Origin(path=path, checkpoint=open_at(path), own=mine is not None)
    except MoeconvError as error:
        raise error.advise(folders.way_back(path, open_at)) from None
    if mine is None or path == folders.resolve(load).resolve():
        return origin
    return dataclasses.replace(origin, notes=_compare_with_load(origin, load, save or mine))


def open_at(path: Path) -> Checkpoint:
    """Open a checkpoint, and make sure that its position in a run, if it has one, can be read.

    Args:
        path: the checkpoint's folder.

    Returns:
        The checkpoint; no tensor has been read.

    Raises:
        MoeconvError: it is none, or its position is damaged.
    """
    checkpoint = open_checkpoint(path)
    if (path / TRAINER_FILE).is_file():
        TrainerState.from_json((path / TRAINER_FILE).read_text(), path / TRAINER_FILE)
    return checkpoint


def _compare_with_load(origin: Origin, load: Path, save: Path) -> tuple[str, ...]:
    """Notice that a run which goes on from --save was begun from something else than --load names now."""
    note = f"going on from {origin.path}, which this run saved; --load {load} is not read"
    try:
        named = open_checkpoint(folders.resolve(load)).model
    except MoeconvError as error:
        return (f"{note} (it can't be: {error})",)
    model = origin.checkpoint.model
    same = (named.family.model_type, named.sizes, named.flags) == (model.family.model_type, model.sizes, model.flags)
    require(
        same,
        f"--save {save} holds a run of another model ({_model_words(model)}) than --load {load} ({_model_words(named)}): "
        "give another --save folder to train the latter, or --load the former",
    )
    before = _loaded_by(origin.path)
    if before is not None and before != load.absolute():
        return (f"WARNING: {note}; the run in {save} began from {before}. To train {load}, give another --save",)
    return (note,)


def _loaded_by(path: Path) -> Path | None:
    """Give the --load of the run that saved a checkpoint; None where it isn't known."""
    import yaml

    try:
        return Path(yaml.safe_load((path / RUN_FILE).read_text(encoding="utf8"))["checkpoint"]["load"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _model_words(model: Model) -> str:
    sizes = model.sizes
    words = [
        model.family.name,
        f"{sizes['layers']} layers",
        f"hidden {sizes['hidden']}",
        f"vocabulary {sizes['vocab']}",
    ]
    return ", ".join(words + ([f"{sizes['experts']} experts"] if "experts" in sizes else []))

"""The checkpoint that a run starts from: its own latest one, or what --load names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.families.base import Model
from moeconv.io.hf_folder import CONFIG
from moeconv.io.manifest import MANIFEST
from moeconv.io.recognise import recognise
from runtime.checkpoint import folder as folders
from runtime.checkpoint.config import CheckpointConfig
from runtime.checkpoint.position import TRAINER_FILE, TrainerState
from runtime.errors import ConfigError, require
from runtime.log.config import LOG_NAME
from runtime.settings.flags import Given
from runtime.settings.resolved import RUN_FILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a run starts."""

    path: Path
    """The checkpoint that says how far the run is."""
    checkpoint: Checkpoint
    """The model; `path` holds it, unless it is a save of adapters."""
    own: bool
    """The run itself wrote it earlier: everything is taken from it, whatever the flags leave out of --load."""
    drawn: bool = False
    """There is no checkpoint: weights are drawn. `path` then has the tokenizer, unless the settings name another."""
    notes: tuple[str, ...] = ()
    """Lines for the log: how it came to be this one."""
    adapters: Checkpoint | None = None
    """The save of adapters at `path`, of the model `checkpoint`."""

    @property
    def state(self) -> Checkpoint:
        """The checkpoint at `path`, which has the optimizer's state, if there is one."""
        return self.adapters or self.checkpoint

    @property
    def title(self) -> str:
        """What the log calls it."""
        return "drawn weights" if self.drawn else str(self.path)


def find_origin(given: Given, places: CheckpointConfig, step: int | None = None) -> Origin:
    """Find what a run starts from: its own latest checkpoint if it has saved already, else what it is told, else nothing.

    Args:
        given: what the command line says; a model is drawn as its flags describe it.
        places: --load and --save.
        step: what --ckpt-step says: the iteration, instead of the latest.

    Returns:
        The checkpoint, opened; no tensor has been read.

    Raises:
        MoeconvError: there is none and none is to be drawn, it can't be read, or --save holds a run of another model than
            --load.
    """
    save = places.save
    mine = folders.latest(save) if save is not None else None
    load = places.load or save
    if mine is None and step is None:
        why = nothing_at(places, _within(given))
        if why is not None:
            return _draw(given, places, why)
    require(load is not None, f"--ckpt-step {step} needs a folder with checkpoints: --load or --save")
    assert load is not None
    if step is not None:
        path = folders.at_step(save if save is not None and mine is not None else load, step).resolve()
    else:
        path = mine or folders.resolve(load)
    try:
        found = open_at(path)
    except MoeconvError as error:
        raise error.advise(folders.way_back(path, open_at)) from None
    if found.adapter is not None:
        return _with_base(path, found, load, own=mine is not None)
    origin = Origin(path=path, checkpoint=found, own=mine is not None)
    if mine is None or path == folders.resolve(load).resolve():
        return origin
    return dataclasses.replace(origin, notes=_compare_with_load(origin, load, save or mine))


def nothing_at(places: CheckpointConfig, others: Iterable[Path] = ()) -> str | None:
    """Say that there is nothing to load, where that is so and no mistake.

    Args:
        places: --load and --save, of a run that has saved nothing yet.
        others: files and folders that the run's other settings name: in its --save folder they are no checkpoint.

    Returns:
        How it comes that there is no checkpoint; None where there is something to open.

    Raises:
        ConfigError: there is none, and it may be a slip: a --load that isn't there, or a folder of other things.
    """
    load, save = places.load, places.save
    where, flag = (load, "--load") if load is not None else (save, "--save")
    if where is None:
        return "neither --load nor --save is given"
    same = save is not None and where.absolute() == save.absolute()
    if not where.exists():
        require(
            same,
            f"--load {where}: no such folder. To draw weights, give --load and --save the same folder, leave --load out, or "
            "name an empty folder",
        )
        return f"no checkpoint at {flag} {where}, which isn't there yet"
    if not where.is_dir() or folders.latest(where) is not None:  # a checkpoint's folder, or that of another run
        return None
    found = sorted(entry.name for entry in where.iterdir() if not (same and _of_a_run(entry, others)))
    if not found:
        return f"no checkpoint at {flag} {where}, which is empty"
    a_run = folders.latest(where) is not None
    if flag == "--load" and (a_run or {CONFIG, MANIFEST} & set(found) or recognise(where) is not None):
        return None  # opened, which says what is wrong with it, if anything is
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    other = "" if flag == "--load" else "; to start from what is there, name it with --load"
    raise ConfigError(f"{flag} {where}: holds no checkpoint, but {shown}. To draw weights, name an empty folder{other}")


def _of_a_run(entry: Path, others: Iterable[Path]) -> bool:
    """Whether something in a --save folder is what a run leaves there before its first checkpoint."""
    passing = entry.name.startswith(folders.TRIAL) or entry.name.endswith((folders.PARTIAL, folders.OLD))
    mine = entry.absolute()
    return (
        passing
        or entry.name in (RUN_FILE, LOG_NAME, "wandb")
        or any(mine == other or mine in other.parents for other in others)
    )


def _within(given: Given) -> list[Path]:
    """List the files and folders that settings other than --load and --save name."""
    named = [value for (group, _), value in given.values.items() if group != "checkpoint"]
    return [value.absolute() for value in named if isinstance(value, Path)]


def _draw(given: Given, places: CheckpointConfig, why: str) -> Origin:
    """Begin with drawn weights, unless that is forbidden."""
    require(
        not places.exit_on_missing_checkpoint,
        f"--exit-on-missing-checkpoint: {why}; leave the flag out to draw weights",
    )
    # Imported here: whoever goes on from a checkpoint needs none of it.
    from runtime.settings.drawn import draw

    checkpoint, path, note = draw(given, why)
    return Origin(path=path, checkpoint=checkpoint, own=False, drawn=True, notes=(note,))


def open_at(path: Path) -> Checkpoint:
    """Open a checkpoint, and make sure that its position in a run, if it has one, can be read.

    Args:
        path: the checkpoint's folder.

    Returns:
        The checkpoint; no tensor has been read.

    Raises:
        MoeconvError: it is none, or its position is damaged.
    """
    checkpoint = open_checkpoint(path, adapters=True)
    if (path / TRAINER_FILE).is_file():
        TrainerState.from_json((path / TRAINER_FILE).read_text(), path / TRAINER_FILE)
    return checkpoint


def _with_base(path: Path, adapters: Checkpoint, load: Path, *, own: bool) -> Origin:
    """Find the model that saved adapters belong to: what --load names, unless that is adapters too, else where it was."""
    assert adapters.adapter is not None
    base, recorded = folders.resolve(load), Path(adapters.adapter.base_path)
    if base.resolve() == path.resolve() or open_checkpoint(base, adapters=True).adapter is not None:
        require(
            recorded.exists(),
            f"{path} holds adapters of the model {recorded}, which is gone: give its place with --load, and this run's folder with --save",
        )
        base = recorded
    note = f"going on from the adapters {path}, of the model {base}"
    return Origin(path=path, checkpoint=open_checkpoint(base), own=own, notes=(note,), adapters=adapters)


def _compare_with_load(origin: Origin, load: Path, save: Path) -> tuple[str, ...]:
    """Notice that a run which goes on from --save was begun from something else than --load names now."""
    note = f"going on from {origin.path}, which this run saved; --load {load} is not read"
    if not load.exists() or (load.is_dir() and not any(load.iterdir())):  # the run began with drawn weights
        return (note,)
    try:
        named = open_checkpoint(folders.resolve(load), adapters=True).model
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

"""A commented `--config` file for a model: the settings that people choose, with values that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeconv.families.base import Model
from moeconv.layout.degrees import Degrees
from moeconv.layout.shard import divisors
from moeconv.placement import misfits
from runtime.settings.fields import Setting, settings


def example(model: Model, path: Path) -> str:
    """Write a `--config` file to begin with.

    Args:
        model: what is trained.
        path: its checkpoint.

    Returns:
        YAML: each setting with what it does; those that most runs leave alone are commented out.
    """
    sizes = model.sizes
    experts = f", {sizes['experts']} experts" if "experts" in sizes else ""
    lines = [
        f"# Trains {path.name}: {model.family.name}, {sizes['layers']} layers of width {sizes['hidden']}{experts}.",
        "# moeconv train --config FILE    (or torchrun [...] -m runtime.train --config FILE)",
        "# Flags on the command line win over this file; `moeconv train --help` lists all of them.",
    ]
    by_name = {(s.group, s.field): s for s in settings()}
    for group, rows in _choices(model, path).items():
        lines += ["", f"{group}:"]
        for field, (value, note) in rows.items():
            lines += _lines(by_name[group, field], value, note)
    return "\n".join(lines) + "\n"


def _lines(setting: Setting, value: Any, note: str) -> Iterator[str]:
    text = setting.help + (f". {note}" if note else "")
    yield from (f"  # {line}" for line in _wrap(text))
    off = value is None
    shown = setting.default if off else value
    words = f"[{', '.join(map(str, shown))}]" if isinstance(shown, tuple) else str(shown)
    words = "null" if shown is None else words.lower() if isinstance(shown, bool) else words
    yield f"  {'# ' if off else ''}{setting.name[2:]}: {words}"


def _wrap(text: str, width: int = 100) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    yield line


def _choices(model: Model, path: Path) -> dict[str, dict[str, tuple[Any, str]]]:
    """Group -> field -> value and what is to be said of it; None leaves the setting at its default, commented out."""
    longest = model.compute.max_positions
    checkpoint = {
        "load": (path, ""),
        "save": ("run", ""),
        "save_interval": (500, ""),
        "keep_last": (3, ""),
    }
    train = {
        "train_iters": (1000, ""),
        "micro_batch_size": (1, "Larger is faster until memory ends"),
        "global_batch_size": (None, "With 0 the step grows with the ranks: set it, for example 128"),
        "seq_length": (min(4096, longest or 4096), f"The model was made for {longest}" if longest else ""),
        "dtype": (None, "bfloat16 on GPUs"),
        "eval_interval": (100, ""),
        "eval_iters": (10, ""),
    }
    schedule = {"lr_decay_style": ("cosine", ""), "lr_warmup_iters": (50, ""), "min_lr": ("1e-6", "")}
    parallel = {
        "tp": (None, _fits(model, "tp")),
        "sp": (None, "Always with tensor parallelism"),
        "pp": (None, f"The model has {model.sizes['layers']} layers"),
        "cp": (None, "For long sequences"),
        "use_distributed_optimizer": (True, ""),
    }
    moe = {
        "aux_loss_coeff": ((0.01,), "0 doesn't balance"),
        "z_loss_coeff": (0.001, ""),
        "recompute_layer": (None, "Saves memory"),
    }
    groups: dict[str, dict[str, tuple[Any, str]]] = {
        "checkpoint": checkpoint,
        "data": {"paths": (("text.jsonl",), ""), "split": ((98, 2, 0), ""), "tokenizer": (None, "")},
        "train": train,
        "optim": {"lr": ("1e-5", ""), "weight_decay": (0.1, ""), "clip_grad": (None, "")},
        "learning_rate": schedule,
        "parallel": parallel,
        "moe": moe,
        "log": {"interval": (10, ""), "file": ("run/log.jsonl", ""), "tensorboard_dir": (None, "")},
    }
    if model.compute.router is None:
        del groups["moe"]
    else:
        parallel |= {"ep": (None, _fits(model, "ep")), "etp": (None, "1 with many ranks of experts")}
    return groups


def _fits(model: Model, axis: str) -> str:
    """Name the degrees along an axis that the model allows."""
    size = model.sizes["heads"] if axis == "tp" else model.sizes["experts"]
    fits = []
    for degree in divisors(size):
        degrees = Degrees(tp=degree) if axis == "tp" else Degrees(ep=degree)
        if not any(misfit.axis == axis for misfit in misfits(model, degrees)):
            fits.append(degree)
    return f"Fits this model: {', '.join(map(str, fits))}"

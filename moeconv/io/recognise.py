"""What is it? Folders and files that are no checkpoint of ours, by what lies in them, with the way on from there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MOST = 20_000  # names that are looked at


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of folder: how to know it, what to call it, and what to do with it, in which `{root}` stands for the folder."""

    found: Callable[[Sequence[str]], bool]
    """Told of the names in it, those in folders below with a slash."""
    words: str
    advice: str


def _any(pattern: str) -> Callable[[Sequence[str]], bool]:
    expression = re.compile(pattern)
    return lambda names: any(expression.fullmatch(name) for name in names)


def _all(*patterns: str) -> Callable[[Sequence[str]], bool]:
    rules = [_any(pattern) for pattern in patterns]
    return lambda names: all(rule(names) for rule in rules)


_MEGATRON = "moeconv import-megatron {root} OUT"
# The first that fits counts.
KINDS: tuple[Kind, ...] = (
    Kind(
        _all(r"adapter_config\.json", r"adapter_model\..*"),
        "a PEFT adapter, which holds changes to another model's weights",
        "merge it into that model with peft's `merge_and_unload` and `save_pretrained`, and convert the result",
    ),
    Kind(
        _any(r"latest_checkpointed_iteration\.txt|(iter_\d+/)?mp_rank_\d\d(_\d\d\d){0,2}/model_optim_rng\.pt"),
        "a Megatron-Core checkpoint",
        f"import it with `{_MEGATRON}`",
    ),
    Kind(
        _all(r"(iter_\d+/)?common\.pt", r"(iter_\d+/)?(\.metadata|metadata\.json)"),
        "a Megatron-Core checkpoint of the format torch_dist",
        f"import it with `{_MEGATRON}`",
    ),
    Kind(
        _any(r"(.*/)?(zero_pp_rank_.*_optim_states\.pt|bf16_zero_pp_rank_.*\.pt|zero_to_fp32\.py)"),
        "a DeepSpeed ZeRO checkpoint, whose weights lie in the ranks' optimizer states",
        "put them together with its own `python zero_to_fp32.py . OUT --safe_serialization`, add the model's config.json, and convert OUT",
    ),
    Kind(
        _any(r"(pytorch_model_fsdp_\d+/)?__\d+_\d+\.distcp"),
        "a sharded checkpoint of torch.distributed.checkpoint (FSDP)",
        "put it together with `accelerate merge-weights {root} OUT`, add the model's config.json, and convert OUT",
    ),
    Kind(
        _any(r".*\.nemo|model_weights/.*|model_config\.yaml"),
        "a NeMo checkpoint",
        "export it with NeMo's own script to Hugging Face, and convert that",
    ),
    Kind(
        _any(r".*\.gguf"),
        "a GGUF model, whose weights are quantised for another program",
        "convert the original repository",
    ),
    Kind(
        _any(r"consolidated[\w.-]*\.(pth|safetensors)"),
        "a checkpoint in its maker's own names (consolidated.*)",
        "download the same repository's model*.safetensors and config.json",
    ),
    Kind(
        _any(r"models--[^/]+--[^/]+(/.*)?"),
        "the root of a hub cache",
        "give a repository's id (OWNER/NAME), or the folder models--OWNER--NAME/snapshots/COMMIT in it",
    ),
    Kind(
        _any(r"snapshots/[^/]+/.*"),
        "a repository in the hub's cache",
        "give the folder snapshots/COMMIT in it, or the repository's id (OWNER/NAME)",
    ),
    Kind(
        _any(r"(.*/)?[^/]*\.incomplete"),
        "a download that did not finish",
        "run the same download again: it goes on where it stopped",
    ),
    Kind(
        _any(r"(.*/)?(flax_model\.msgpack|tf_model\.h5|model\.ckpt.*|.*\.onnx)"),
        "a model in another framework's format",
        "download the repository's model*.safetensors, or load it in transformers and save it with save_pretrained",
    ),
)


def recognise(root: Path) -> str | None:
    """Say what a folder is that holds no Hugging Face weights.

    Args:
        root: the folder.

    Returns:
        What it is, and what to do, in one sentence; None where it is nothing that is known.
    """
    names = [name for name, _ in zip(_names(root), range(_MOST), strict=False)]
    folders = [name for name in names if name.endswith((".bin", ".safetensors")) and (root / name).is_dir()]
    if folders:
        return f"{root / folders[0]}: is a folder, and a file of weights is expected; it may be an archive that was unpacked: download the file again"
    for kind in KINDS:
        if kind.found(names):
            return f"{root}: is {kind.words}; {kind.advice.format(root=root)}"
    return None


def _names(root: Path) -> Iterator[str]:
    """The names in a folder, and in the folders below it, four deep; links to folders are not followed."""
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop(0)
        try:
            entries = sorted(folder.iterdir())
        except OSError:
            continue
        for entry in entries:
            yield entry.relative_to(root).as_posix()
            if depth < 3 and entry.is_dir() and not entry.is_symlink():
                pending.append((entry, depth + 1))

"""The data files that a path names: a file, Megatron's prefix, a folder, a saved dataset, or one of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.data.errors import DataError, need
from runtime.data.kinds import DataFile, Kind, recognise

HUB = "hf://"
_HUB_FORM = f"{HUB}OWNER/NAME[/CONFIG][:SPLIT]"
_SHARD = re.compile(r"^(?P<before>.*?)(?P<number>\d{4,})-of-(?P<total>\d{4,})(?P<after>.*)$")
_BESIDE = re.compile(
    r"^(readme|license|licence|notice|changelog)([.-].*)?$|\.(idx|lock|md5|sha256|prepare\.json)$", re.I
)
_MEGATRON_CACHE = re.compile(r"\w*Dataset_indices")
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class Listing:
    """The data files of one path, in order."""

    files: tuple[DataFile, ...]
    left_out: tuple[str, ...] = ()
    """Files of a folder that are not read, each with the reason."""


def list_files(path: str) -> Listing:
    """List the data files that a path names.

    Args:
        path: a file, a folder (searched through in the order of names), Megatron's prefix of a .bin and .idx pair, a
            folder that `datasets` saved, or hf://OWNER/NAME[/CONFIG][:SPLIT].

    Returns:
        The files.

    Raises:
        DataError: it doesn't exist, holds no data, is of an unknown kind, or a numbered file of it is missing.
    """
    if path.startswith(HUB):
        return _hub(path)
    where = Path(path)
    pair = where.with_name(where.name + ".bin") if where.name else where
    index = pair.with_suffix(".idx")
    if pair.is_file() and index.is_file():  # comes first: Megatron keeps a cache in a folder of the prefix's name
        return Listing((DataFile(pair, Kind.TOKENS),))
    if where.is_dir():
        return _folder(where)
    if where.is_file():
        return Listing((recognise(where),))
    if index.is_file() and not pair.is_file():
        raise DataError(f"{pair}: is missing; its index {index.name} is there")
    if pair.is_file():
        raise DataError(f"{index}: is missing; {pair.name} is there (name the .bin file itself for bare ids)")
    raise DataError(f"{path}: no such file or folder, and no {pair.name}; a dataset of the hub is {_HUB_FORM}")


def _folder(folder: Path) -> Listing:
    files: list[DataFile] = []
    left_out: list[str] = []
    _walk(folder, files, left_out)
    if not files:
        what = f"; left out: {'; '.join(left_out[:5])}" if left_out else ""
        raise DataError(f"{folder}: no data files in this folder{what}")
    _check_numbering([file.path for file in files])
    return Listing(tuple(files), tuple(left_out))


def _walk(folder: Path, files: list[DataFile], left_out: list[str]) -> None:
    if (folder / "dataset_dict.json").is_file():
        raise _several_splits(folder)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        files += _saved_dataset(folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "_")):
            continue
        if entry.is_dir() and _MEGATRON_CACHE.fullmatch(entry.name):
            left_out.append(f"{entry}: Megatron's cache of indices")
        elif entry.is_dir():
            _walk(entry, files, left_out)
        elif entry.suffix == ".idx" and not entry.with_suffix(".bin").is_file():
            raise DataError(f"{entry.with_suffix('.bin')}: is missing; its index {entry.name} is there")
        elif _BESIDE.search(entry.name) or entry.name in _DATASET_MARKS:
            if entry.suffix != ".idx":
                left_out.append(f"{entry}: goes with the data")
        elif entry.is_file():
            try:
                files.append(recognise(entry))
            except DataError as error:
                left_out.append(str(error).split(";")[0])


def _several_splits(folder: Path) -> DataError:
    splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
    return DataError(
        f"{folder}: a saved dataset with the splits {', '.join(splits)}; name one: {folder / (splits or ['train'])[0]}"
    )


def _saved_dataset(folder: Path) -> list[DataFile]:
    """The Arrow files of a folder that `datasets` saved, in its order.

    Source: https://github.com/huggingface/datasets/blob/4.0.0/src/datasets/arrow_dataset.py (save_to_disk).
    """
    path = folder / "state.json"
    try:
        state: Any = json.loads(path.read_text(encoding="utf8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is damaged; expected the state that datasets' save_to_disk writes") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise DataError(
            f"{folder}: {', '.join(missing) or 'every data file'} of this saved dataset is missing; copy it again"
        )
    return [DataFile(folder / name, Kind.ARROW) for name in names]


def _check_numbering(paths: Sequence[Path]) -> None:
    """Refuse a folder where a file of a numbered set (00003-of-00010) is missing."""
    found: dict[tuple[Path, str, str, str], set[int]] = {}
    for path in paths:
        if match := _SHARD.match(path.name):
            key = (path.parent, match["before"], match["total"], match["after"])
            found.setdefault(key, set()).add(int(match["number"]))
    for (folder, before, total, after), numbers in found.items():
        first = 1 if int(total) in numbers else 0
        missing = sorted(set(range(first, first + int(total))) - numbers)
        if missing:
            names = [f"{before}{number:0{len(total)}d}-of-{total}{after}" for number in missing[:3]]
            raise DataError(
                f"{folder}: {len(missing)} of {int(total)} files are missing: {', '.join(names)}"
                f"{' ...' if len(missing) > 3 else ''}; get them, or name the files that you want one by one"
            )


def _hub(path: str) -> Listing:
    """Download a dataset of the hub with the library `datasets`, and give the Arrow files of its cache."""
    try:
        import datasets
    except ImportError:
        raise need("datasets", path) from None
    match = re.fullmatch(
        r"(?:datasets/)?(?P<name>[^/:]+/[^/:]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>\w+))?", path[len(HUB) :]
    )
    if match is None:
        raise DataError(f"{path}: expected {_HUB_FORM}")
    return _load_hub(datasets, path, match["name"], match["config"], match["split"] or "train")


def _load_hub(datasets: Any, path: str, name: str, config: str | None, split: str) -> Listing:
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises whatever its readers and the network raise
        raise DataError(f"{path}: can't be loaded from the hub ({type(error).__name__}: {error})") from error
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    if not files:
        raise DataError(f"{path}: {len(dataset)} rows and no file in the library's cache; nothing to read")
    return Listing(tuple(DataFile(file, Kind.ARROW) for file in files))

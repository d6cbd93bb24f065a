"""Names that wrappers lengthened: torch.compile, DistributedDataParallel and PEFT each put a prefix before every tensor's name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moeconv.errors import MappingError
from moeconv.io.hf_folder import HFFolder


def shared_prefix(names: Collection[str], known: Collection[str]) -> str | None:
    """Find what stands before every name, if a model's names are behind it.

    Args:
        names: the stored tensors' names.
        known: the model's.

    Returns:
        The shortest such prefix, with its dot, as `module.`; None where there is none.
    """
    prefix, columns = "", zip(*(name.split(".")[:-1] for name in names), strict=False)
    for column in columns:
        parts: set[str] = set(column)
        if len(parts) > 1:
            break
        prefix += parts.pop() + "."
        if any(name.removeprefix(prefix) in known for name in names):
            return prefix
    return None


def strip_prefix(folder: HFFolder, prefix: str) -> HFFolder:
    """Read a folder's tensors under names without a prefix.

    Args:
        folder: the folder.
        prefix: what each name begins with.

    Returns:
        The folder. Its headers are no file's any more: an export cuts files of its own.

    Raises:
        MappingError: a name begins otherwise.
    """
    headers = {}
    for file, header in folder.headers.items():
        for entry in header.entries:
            if not entry.name.startswith(prefix) or entry.name == prefix:
                raise MappingError(f"--strip-prefix {prefix}: {entry.name} in {file} does not begin with it")
        entries = tuple(replace(entry, name=entry.name.removeprefix(prefix)) for entry in header.entries)
        headers[file] = replace(header, raw=b"", entries=entries)
    return replace(folder, headers=headers)


def check_prefix(folder: HFFolder, known: Collection[str]) -> None:
    """Refuse a folder none of whose names is the model's because something stands before all of them.

    Args:
        folder: the folder.
        known: the model's names.

    Raises:
        MappingError: it is such; names the flag that reads it.
    """
    names = {entry.name for header in folder.headers.values() for entry in header.entries}
    prefix = shared_prefix(names, known) if names.isdisjoint(known) else None
    if prefix is not None:
        raise MappingError(
            f"{folder.root}: every tensor's name begins with {prefix!r}, which a wrapper (torch.compile, DistributedDataParallel, PEFT) put "
            f"there; read it as the model with `moeconv import-hf {folder.root} OUT --strip-prefix {prefix}`"
        )

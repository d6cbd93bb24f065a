"""The conversions as functions, for use from Python; `moeconv` itself offers them by the same names."""

from __future__ import annotations

from pathlib import Path

from moeconv.checking import verify as verify_checkpoint
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, plan_sharded, write_hf, write_sharded
from moeconv.errors import SourceError
from moeconv.formats import open_any
from moeconv.hub import local_folder
from moeconv.hub_preview import opened
from moeconv.layout.degrees import Degrees


def open(source: str | Path) -> Checkpoint:
    """Open a checkpoint of any kind; headers alone are read, or downloaded files found in the hub's cache.

    Args:
        source: a folder (sharded, Hugging Face, Megatron-Core), or a hub repository's id.

    Returns:
        The checkpoint: `model`, `tensors`, and `read(name, rect)` for a part of a tensor as a numpy array.

    Raises:
        MoeconvError: it is none, or contradicts itself.
    """
    return open_any(local_folder(str(source)))


def import_hf(source: str | Path, out: str | Path, degrees: Degrees, *, options: Options | None = None) -> Checkpoint:
    """Turn a Hugging Face checkpoint into a sharded one.

    Args:
        source: a folder, or a hub repository's id.
        out: the folder to make.
        degrees: the layout, such as `moeconv.Degrees(tp=4, ep=4)`.
        options: threads, resuming, progress.

    Returns:
        The sharded checkpoint, opened.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """

    def open_folder(folder: Path) -> Checkpoint:
        found = open_checkpoint(folder)
        if found.kind == "sharded":
            raise SourceError(f"{source}: is sharded already; change its layout with reshard")
        return found

    found = opened(str(source), None, open_folder, lambda found: plan_sharded(found, degrees))
    write_sharded(found, Path(out), degrees, options or Options())
    return open_checkpoint(out)


def reshard(source: str | Path, out: str | Path, degrees: Degrees, *, options: Options | None = None) -> Checkpoint:
    """Turn a sharded checkpoint into one of another layout; optimizer state goes along. Arguments as of `import_hf`."""
    found = open_checkpoint(source, adapters=True)
    if found.kind != "sharded":
        raise SourceError(f"{source}: is {found.title}; shard it with import_hf")
    write_sharded(found, Path(out), degrees, options or Options())
    return open_checkpoint(out)


def export_hf(
    source: str | Path, out: str | Path, *, max_shard_size: int | None = None, options: Options | None = None
) -> Checkpoint:
    """Turn a sharded checkpoint into a Hugging Face folder.

    Args:
        source: the sharded checkpoint.
        out: the folder to make.
        max_shard_size: bytes of tensors a file at most; None gives the imported files back, byte for byte.
        options: threads, resuming, progress.

    Returns:
        The folder, opened.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.
    """
    write_hf(open_checkpoint(source), Path(out), max_shard_size, options or Options())
    return open_checkpoint(out)


def verify(source: str | Path) -> int:
    """Check every checksum of a checkpoint, and that it can be read to its last byte.

    Returns:
        The number of bytes of tensors checked.

    Raises:
        IntegrityError: bytes differ from their checksum.
        SourceError: a file can't be read.
    """
    return verify_checkpoint(open(source))

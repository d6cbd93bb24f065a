"""A Megatron checkpoint as a `Checkpoint` like any other: under hub names, to inspect, compare, shard and export."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint import TRAINER, Checkpoint
from moeconv.dtypes import numpy_dtype
from moeconv.errors import IntegrityError, SourceError
from moeconv.io.carried import Content, carried_files, read_content
from moeconv.io.decode import parse_json
from moeconv.io.hf_folder import CONFIG
from moeconv.io.paths import check_inside
from moeconv.io.torch_archive import check_archive
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.megatron.source import TRACKER, MegatronSource
from moeconv.pieces import Piece, TensorInfo, common_shape
from moeconv.reading import read_rect
from moeconv.sweep import Sweep, open_strips

_SKIP = (".pt", ".bin", ".safetensors", ".distcp")


@dataclass(frozen=True)
class MegatronCheckpoint(Checkpoint):
    """An opened Megatron checkpoint; `megatron` has what only Megatron says: format, spec, args, replicas."""

    megatron: MegatronSource | None = None

    @property
    def title(self) -> str:
        """What kind of checkpoint it is, in words."""
        assert self.megatron is not None
        source = self.megatron
        return f"Megatron-Core {source.fmt} ({source.spec} layers, {source.experts} experts, {source.degrees})"

    def check(self) -> None:
        """Check what only a Megatron checkpoint has: the archives' CRC-32s, and that replicated tensors agree.

        Raises:
            IntegrityError: bytes were changed, or ranks that should be alike hold different values.
        """
        assert self.megatron is not None
        for file, offset, length in self.megatron.archives:
            check_archive(check_inside(self.root, file), offset, length)
        self.check_replicas()

    def check_replicas(self) -> None:
        """Check that copies of a rectangle in several ranks' files hold the same bytes.

        Raises:
            IntegrityError: names the tensor and the two files that disagree.
        """
        assert self.megatron is not None
        for first, other in self.megatron.replicas:
            shape = first.rect.shape
            sweep = Sweep(TensorInfo(first.tensor, first.dtype, shape))
            alone = [replace(piece, rect=Rect.whole(shape)) for piece in (first, other)]
            with open_strips(self.root, alone[:1], shape) as left, open_strips(self.root, alone[1:], shape) as right:
                for begin, end in sweep.bands():
                    if not np.array_equal(sweep.read(left, begin, end), sweep.read(right, begin, end, "other")):
                        raise IntegrityError(
                            f"{first.tensor} {first.rect}: {first.file} and {other.file} hold different values; ranks "
                            "that should be alike have diverged, so neither can be taken for the model"
                        )

    @property
    def degrees(self) -> Degrees:
        """The layout's degrees, as the rank files or the args say."""
        assert self.megatron is not None
        return self.megatron.degrees

    @cached_property
    def carried_files(self) -> dict[str, Content]:
        """The config, as it lies beside the checkpoint or made from its args, and the tokenizer's files."""
        out = carried_files(self.root, None, self.carried)
        if CONFIG not in out or parse_json(read_content(out[CONFIG]), str(self.root / CONFIG)) != self.config:
            out[CONFIG] = (json.dumps(self.config, indent=2) + "\n").encode()
        assert self.megatron is not None
        if self.megatron.trainer is not None:
            out[TRAINER] = (json.dumps(self.megatron.trainer, indent=2) + "\n").encode()
        return out

    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Read a part of a tensor; see `Checkpoint.read`.

        Raises:
            SourceError: there is no such tensor, or a file can't be read.
        """
        if name not in self.tensors:
            raise SourceError(f"{self.root}: holds no tensor {name}")
        info = self.tensors[name]
        wanted = rect or Rect.whole(info.shape)
        if common_shape(info.shape, self.pieces[name]) != info.shape:
            return read_rect(self.root, info, self.pieces[name], rect)
        out = np.empty(wanted.shape, numpy_dtype(info.dtype))
        sweep = Sweep(info)
        with open_strips(self.root, self.pieces[name], info.shape) as strips:
            for begin in range(wanted.offsets[0], wanted.ends[0], sweep.band):
                end = min(begin + sweep.band, wanted.ends[0])
                rows = sweep.read(strips, begin, end).view(out.dtype).reshape(end - begin, *info.shape[1:])
                out[begin - wanted.offsets[0] : end - wanted.offsets[0]] = rows[(slice(None), *wanted.slices()[1:])]
        return out


def as_checkpoint(source: MegatronSource) -> MegatronCheckpoint:
    """Make an opened Megatron checkpoint a `Checkpoint`.

    Args:
        source: the opened checkpoint.

    Returns:
        The checkpoint, with its tensors under their hub names.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in source.pieces:
        pieces.setdefault(piece.tensor, []).append(piece)
    shapes = {name: t.shape for name, t in source.model.tensors.items()}
    tensors = {n: TensorInfo(n, p[0].dtype, shapes[n.removeprefix(_state(n))]) for n, p in pieces.items()}
    return MegatronCheckpoint(
        root=source.root,
        kind="megatron",
        config=dict(source.config),
        model=source.model,
        tensors=tensors,
        pieces=pieces,
        checksums={},
        carried=tuple(_beside(source.root)),
        megatron=source,
    )


def _state(name: str) -> str:
    """Give the prefix of an optimizer's tensor, or nothing."""
    return ".".join(name.split(".")[:2]) + "." if name.startswith("optimizer.") else ""


def _beside(root: Path) -> list[str]:
    """List the files that an export put beside the checkpoint: config and tokenizer."""
    names = [p.name for p in sorted(root.iterdir()) if not p.is_dir() and not p.name.startswith(".")]
    return [name for name in names if name != TRACKER and not name.endswith(_SKIP)]

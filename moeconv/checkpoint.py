"""A checkpoint on disk, sharded or not: its model, its tensors, and where every byte of them is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeconv.access import TensorAccess
from moeconv.agreement import check_manifest, stage_layers
from moeconv.errors import IntegrityError, MappingError, SourceError
from moeconv.families import family_of
from moeconv.families.adapted import AdaptedModel, adapted_weights
from moeconv.families.base import CARRIED, Family, Model
from moeconv.family_form import in_form
from moeconv.io.adapter import AdapterRecord
from moeconv.io.carried import Content, carried_files, read_content
from moeconv.io.checksum import checksum
from moeconv.io.decode import brief, parse_json
from moeconv.io.hf_folder import CONFIG, HFFolder, read_hf_folder
from moeconv.io.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileRecord, Manifest
from moeconv.io.paths import check_folder, check_inside, read_inside
from moeconv.io.safetensors import Header, read_header
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect, check_cover
from moeconv.pieces import NameMap, Piece, TensorInfo, as_stored, check_complete, check_scaled
from moeconv.placement import split_optimizer_name
from moeconv.plan import RowOp
from moeconv.prefixes import check_prefix, strip_prefix
from moeconv.reading import read_rect

TRAINER = "trainer.json"
MAX_LAYERS, MAX_BLOCKS = 10_000, 200_000  # layers, or experts of a layer; experts of a model: several times the largest


@dataclass(frozen=True)
class Checkpoint(TensorAccess):
    """An opened checkpoint. Opening reads headers only; `checksums` (by file and tensor) are there for sharded ones.

    `ops` is empty for what is on disk: a checkpoint that is only planned names there what makes its tensors of others' bytes.
    """

    root: Path
    "Its folder."
    kind: Literal["hf", "sharded", "megatron", "planned"]
    "What it is on disk; `planned` is not there yet."
    config: dict[str, Any]
    "config.json, as parsed."
    model: Model
    "What the config describes: sizes, and every tensor by name."
    tensors: dict[str, TensorInfo]
    "What is stored: dtype and shape by the hub's name; an optimizer's as `optimizer.<state>.<name>`."
    pieces: dict[str, list[Piece]]
    checksums: dict[tuple[str, str], str]
    carried: tuple[str, ...]
    manifest: Manifest | None = None
    folder: HFFolder | None = None
    ops: Mapping[str, RowOp] = field(default_factory=dict)
    rewritten: Mapping[str, bytes] = field(default_factory=dict)
    """Contents that go along instead of a carried file's."""
    adapter: AdapterRecord | None = None
    """Of adapters that are saved without the model that they belong to."""

    def with_model(self, model: Model) -> Checkpoint:
        """Give the same tensors under another config of the same family, which goes along instead of the stored one."""
        config = dict(model.config)
        text = (json.dumps(config, indent=2) + "\n").encode()
        return replace(self, config=config, model=model, rewritten={**self.rewritten, CONFIG: text})

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.model.family

    @property
    def title(self) -> str:
        """What kind of checkpoint it is, in words."""
        if self.adapter is not None:
            return "a save of adapters"
        return "Hugging Face" if self.kind == "hf" else self.kind

    @property
    def degrees(self) -> Degrees:
        """The layout's degrees; all 1 for a Hugging Face folder."""
        return Degrees.from_json(self.manifest.degrees) if self.manifest else Degrees()

    @property
    def dropped(self) -> list[str]:
        """What the source's folder holds that is not converted, with the reason."""
        if self.folder is None:
            return []
        count = len(self.folder.computed)
        found = [f"{count} rotary_emb.inv_freq buffers (computed from config.json)"] if count else []
        return found + [f"{name}, {size:,} bytes (no part of the model)" for name, size in self.folder.beside.left]

    @property
    def files(self) -> list[str]:
        """The files that hold tensors, relative to the root."""
        return sorted({piece.file for pieces in self.pieces.values() for piece in pieces})

    @cached_property
    def carried_files(self) -> dict[str, Content]:
        """What goes along unchanged, by name: files that are there, those of a sharded checkpoint with the manifest's checksums."""
        found = carried_files(self.root, self.manifest.carried if self.manifest else None, self.carried)
        return {**found, **self.rewritten}

    @cached_property
    def carried_bytes(self) -> dict[str, bytes]:
        """The contents of `carried_files`, checked; once read, they stay when the folder goes."""
        return {name: read_content(content) for name, content in self.carried_files.items()}

    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Read a part of a tensor from whatever files hold it, and only that; `VerifiedReader` also compares checksums.

        Args:
            name: the tensor's hub name.
            rect: the part to read; by default the whole tensor.

        Returns:
            An array of the part's shape in the tensor's own dtype (ml_dtypes' bfloat16 for BF16).

        Raises:
            SourceError: there is no such tensor, or a file can't be read.
        """
        if name not in self.tensors:
            raise SourceError(f"{self.root}: holds no tensor {name}")
        return read_rect(self.root, self.tensors[name], self.pieces[name], rect)


def open_checkpoint(
    path: Path | str, carry: Sequence[str] = (), prefix: str = "", *, adapters: bool = False
) -> Checkpoint:
    """Open a sharded checkpoint or a Hugging Face folder, and check that its tensors are exactly those that its config implies.

    Args:
        path: the folder.
        carry: shell-style patterns of tensors of a Hugging Face folder that the family doesn't know and that go along unread.
        prefix: what stands before every name of a Hugging Face folder and is taken off.
        adapters: whether a save of adapters will do, which holds no model.

    Returns:
        The checkpoint; no tensor has been read.

    Raises:
        SourceError: the folder, a header or the manifest is missing or malformed.
        MappingError: a tensor is unknown, missing, twice there or misshapen.
        IntegrityError: the manifest and the files disagree.
    """
    root = Path(path)
    check_folder(root)
    if (root / MANIFEST).exists():
        found = _open_sharded(root, carry, prefix)
        if found.adapter is not None and not adapters:
            raise SourceError(
                f"{root}: holds adapters and not the model {found.adapter.base_path} that they belong to; `moeconv merge` makes "
                "a model of both, `moeconv export-adapter` files for PEFT"
            )
        return found
    if list(root.glob("*-pp[0-9]*.safetensors")) or root.name.endswith(".partial"):
        raise SourceError(
            f"{root}: has no {MANIFEST}: the run that wrote it did not finish; finish it with --resume, or remove the folder"
        )
    return _open_hf(root, carry, prefix)


def _open_hf(root: Path, carry: Sequence[str], prefix: str) -> Checkpoint:
    folder = read_hf_folder(root)
    model = model_of(folder.config, str(root / CONFIG))
    if prefix:
        folder = strip_prefix(folder, prefix)
    shapes = {entry.name: entry.shape for header in folder.headers.values() for entry in header.entries}
    model = in_form(model, shapes)
    check_prefix(folder, model.plain)
    model = as_stored(model, shapes, carry)
    names = NameMap(model)
    pieces: dict[str, list[Piece]] = {}
    for file, header in folder.headers.items():
        for entry in header.entries:
            for piece in names.pieces(entry.name, entry.dtype, entry.shape, file, entry.begin):
                pieces.setdefault(piece.tensor, []).append(piece)
    for name, found in pieces.items():
        if len(found) > 1:
            raise MappingError(
                f"{name} is stored twice, in {found[0].file} and {found[1].file}, under its own name and fused; remove one"
            )
    check_complete(model, pieces, str(root))
    ordered = {name: pieces[name] for name in model.tensors if name in pieces}
    tensors = {name: TensorInfo(name, found[0].dtype, model.tensors[name].shape) for name, found in ordered.items()}
    check_scaled(model, tensors.values(), str(root))
    return Checkpoint(root, "hf", folder.config, model, tensors, ordered, {}, folder.beside.carried, None, folder)


def _open_sharded(root: Path, carry: Sequence[str], prefix: str) -> Checkpoint:
    if carry:
        raise SourceError(f"{root}: --carry {carry[0]}: is sharded; say at the import what it carries")
    if prefix:
        raise SourceError(
            f"{root}: --strip-prefix {prefix}: is sharded, under the model's own names; leave the flag out"
        )
    manifest = Manifest.decode(read_inside(root, MANIFEST, MAX_MANIFEST_BYTES), str(root / MANIFEST))
    config = parse_json(read_inside(root, CONFIG), str(root / CONFIG))
    shapes = {t.name: t.shape for record in manifest.files.values() for t in record.tensors}
    unread = [t.name for name, f in manifest.files.items() if name.startswith(f"{CARRIED}-") for t in f.tensors]
    model = in_form(model_of(config, str(root / CONFIG)), shapes)
    model = as_stored(model, shapes, [escape(name) for name in unread])
    if manifest.adapter is not None:
        held = {split_optimizer_name(name)[1] for name in shapes}
        whole = held & model.plain.keys()
        model = AdaptedModel.of(model, manifest.adapter.rank, adapted_weights(model, held), whole).by_itself()
    pieces: dict[str, list[Piece]] = {}
    tensors: dict[str, TensorInfo] = {}
    checksums: dict[tuple[str, str], str] = {}
    for name, record in manifest.files.items():
        header = read_header(check_inside(root, name))
        _check_header(root, record, header)
        for t, entry in zip(record.tensors, header.entries, strict=True):
            info = TensorInfo(t.name, t.dtype, t.shape)
            if tensors.setdefault(t.name, info) != info:
                raise IntegrityError(
                    f"{root / MANIFEST}: {t.name} is {tensors[t.name]} in one file and {info} in {name}"
                )
            pieces.setdefault(t.name, []).append(Piece(t.name, t.dtype, Rect(t.offsets, t.extent), name, entry.begin))
            checksums[name, t.name] = t.checksum
    for tensor, info in tensors.items():
        base = model.tensors.get(split_optimizer_name(tensor)[1])
        if base is None or base.shape != info.shape:
            raise MappingError(
                f"{tensor} of shape {list(info.shape)} is no tensor that {root / CONFIG} implies; one of the two was changed"
            )
        check_cover(tensor, info.shape, [(p.rect, p.file) for p in pieces[tensor]])
    check_complete(model, tensors, str(root))
    check_manifest(manifest, model, root)
    ordered = sorted(tensors, key=_order(model))
    return Checkpoint(
        root,
        "sharded",
        config,
        model,
        {n: tensors[n] for n in ordered},
        {n: pieces[n] for n in ordered},
        checksums,
        tuple(manifest.carried),
        manifest,
        adapter=manifest.adapter,
    )


def model_of(config: dict[str, Any], where: str) -> Model:
    """Make the model that a config describes, if its tensors can be listed.

    Args:
        config: config.json as parsed.
        where: the file's name, for messages.

    Returns:
        The model.

    Raises:
        MappingError: the family is unknown, a size is missing, or there are more layers and experts than any model has.
    """
    family = family_of(config)
    said = family.language_config(config)
    for size in ("layers", "experts"):
        keys = family.sizes.get(size, ())
        for key in (keys,) if isinstance(keys, str) else keys:
            if isinstance(said.get(key), int) and said[key] > MAX_LAYERS:
                raise MappingError(f"{where}: {key} is {brief(said[key])}; no model has more than {MAX_LAYERS:,}")
    model = Model.from_config(family, config)
    layers, experts = model.sizes["layers"], model.sizes.get("experts", 0)
    if layers * (experts + 1) > MAX_BLOCKS:
        raise MappingError(
            f"{where}: {layers} layers of {experts} experts; no model has more than {MAX_BLOCKS:,} in all"
        )
    return model


def _order(model: Model) -> Any:
    position = {name: index for index, name in enumerate(model.tensors)}

    def key(name: str) -> tuple[str, int]:
        state, base = split_optimizer_name(name)
        return state or "", position[base]

    return key


def _check_header(root: Path, record: FileRecord, header: Header) -> None:
    path = root / record.name
    if header.file_size != record.size:
        raise IntegrityError(f"{path}: {header.file_size} bytes, the manifest says {record.size}; restore the file")
    if checksum(header.raw) != record.header:
        raise IntegrityError(f"{path}: the header differs from its checksum in the manifest; restore the file")
    stored = [(e.name, e.dtype, e.shape) for e in header.entries]
    if stored != [(t.name, t.dtype, t.extent) for t in record.tensors]:
        raise IntegrityError(f"{path}: holds other tensors than the manifest says; restore the file")


def make_manifest(
    source: Checkpoint, degrees: Degrees, records: list[FileRecord], carried: dict[str, tuple[int, str]]
) -> Manifest:
    """Make the manifest of a sharded checkpoint that comes from `source`, whose shard map it keeps.

    Args:
        source: the checkpoint that the bytes came from.
        degrees: the new layout's degrees.
        records: the new files' records.
        carried: size in bytes and checksum of each carried file.

    Returns:
        The manifest.
    """
    from moeconv.io.manifest import SourceFile

    if source.adapter is not None:
        files, index = {}, None
    elif source.manifest is not None:
        files, index = source.manifest.source, source.manifest.index
    elif source.folder is not None and all(h.raw for h in source.folder.headers.values()):
        files = {name: SourceFile(h.file_size, h.raw) for name, h in source.folder.headers.items()}
        index = source.folder.index
    else:  # not from safetensors files: an export cuts files of its own
        files, index = {}, None
    return Manifest(
        family=source.family.model_type,
        degrees=degrees.as_json(),
        stages=stage_layers(source.model.sizes["layers"], degrees),
        files={r.name: r for r in sorted(records, key=lambda r: natural(r.name))},
        carried=dict(sorted(carried.items())),
        source=files,
        index=index,
        adapter=source.adapter,
    )


def natural(name: str) -> tuple[Any, ...]:
    """Give a key that sorts names with numbers as people expect: 2 before 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))

"""Whether a manifest agrees with the files and the config that it is about."""

from __future__ import annotations

import re
from pathlib import Path

from moeconv.errors import IntegrityError
from moeconv.families.base import GlobalTensor, Model, TensorRule
from moeconv.io.manifest import MANIFEST, Manifest, TensorRecord
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.layout.rect import Rect
from moeconv.placement import Placement, rank_rects, split_optimizer_name

_NAME = re.compile(
    r"(?:optimizer-)?(?:dense-tp(?P<tp>\d{1,7})|experts-ep(?P<ep>\d{1,7})-etp(?P<etp>\d{1,7}))-pp(?P<pp>\d{1,7})"
    r"(?:-dp\d+)?(?:-part\d+)?\.safetensors"
)


def stage_layers(num_layers: int, degrees: Degrees) -> list[list[int]]:
    """Give the layers of each pipeline stage, in the order of the rank's chunks.

    Raises:
        LayoutError: the layers can't be shared so.
    """
    chunks = chunk_layers(num_layers, degrees)
    return [
        [layer for chunk in range(stage, len(chunks), degrees.pp) for layer in chunks[chunk]]
        for stage in range(degrees.pp)
    ]


def check_manifest(manifest: Manifest, model: Model, root: Path) -> None:
    """Check that a manifest's family, degrees and stages are those of the config and of the files.

    Args:
        manifest: the manifest, whose tensors are the model's.
        model: the model that config.json describes.
        root: the checkpoint's folder, for messages.

    Raises:
        IntegrityError: they contradict each other.
        LayoutError: the model can't be split by these degrees.
    """
    where = root / MANIFEST
    if manifest.family != model.family.model_type:
        raise IntegrityError(f"{where}: says family {manifest.family!r}, config.json {model.family.model_type!r}")
    degrees = Degrees.from_json(manifest.degrees)
    layout = _Layout(model, degrees)
    if manifest.stages != stage_layers(model.sizes["layers"], degrees):
        raise IntegrityError(f"{where}: its stages are not those of its degrees ({degrees})")
    dense, experts = set[tuple[int, int]](), set[tuple[int, int, int]]()
    for name, record in manifest.files.items():
        found = _NAME.fullmatch(name)
        if found is None:
            continue
        at = {axis: int(number) for axis, number in found.groupdict().items() if number is not None}
        for t in record.tensors:
            if not layout.holds(t, at):
                raise IntegrityError(
                    f"{where}: {name} holds {t.name}, of which that rank of {degrees} holds another part or none"
                )
        if "tp" in at:
            dense.add((at["tp"], at["pp"]))
        else:
            experts.add((at["ep"], at["etp"], at["pp"]))
    if manifest.adapter is not None:
        return  # ranks beside which nothing was trained have no files
    lacking = dense and dense != {(t, p) for t in range(degrees.tp) for p in range(degrees.pp)}
    if lacking or (not experts and degrees.ep > 1) or (experts and experts != layout.expert_ranks()):
        raise IntegrityError(f"{where}: its files are not those of its degrees ({degrees})")


class _Layout:
    """What each rank holds; tensors of a rule are alike, so each rule is worked out once."""

    def __init__(self, model: Model, degrees: Degrees) -> None:
        self.model, self.degrees = model, degrees
        self._placement = Placement(model, degrees)
        self._rects: dict[TensorRule, list[Rect]] = {}

    def holds(self, record: TensorRecord, at: dict[str, int]) -> bool:
        """Say whether the rank with these coordinates holds a stored rectangle."""
        tensor = self.model.tensors[split_optimizer_name(record.name)[1]]
        if self._placement.stage(tensor) != at["pp"]:
            return False
        if "ep" in at and (tensor.expert is None or self._placement.expert_rank(tensor) != at["ep"]):
            return False
        rects = self._held(tensor)
        rank = at["etp"] if "etp" in at else at["tp"]
        inside = rects[0] if len(rects) == 1 else rects[rank] if rank < len(rects) else None
        rect = Rect(record.offsets, record.extent)
        return inside is not None and inside.holds(rect)

    def _held(self, tensor: GlobalTensor) -> list[Rect]:
        found = self._rects.get(tensor.rule)
        if found is None:
            found = self._rects[tensor.rule] = rank_rects(tensor, self.degrees)
        return found

    def expert_ranks(self) -> set[tuple[int, int, int]]:
        """Give the coordinates (ep, etp, pp) of the ranks that hold experts."""
        stages = {self._placement.stage(t) for t in self.model.tensors.values() if t.expert is not None}
        return {(e, x, p) for e in range(self.degrees.ep) for x in range(self.degrees.etp) for p in stages}

"""How programs take tensors out of a checkpoint: one by one, a rank's part, or straight into a module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moeconv.errors import LayoutError, SourceError
from moeconv.extras import needed
from moeconv.families.base import Model
from moeconv.io.manifest import Manifest
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.lazy import LazyTensor
from moeconv.pieces import Piece, TensorInfo
from moeconv.placement import Placement
from moeconv.reading import VerifiedReader

if TYPE_CHECKING:
    from torch import nn


class TensorAccess:
    """What every checkpoint gives by the names of its tensors, whatever lies on disk."""

    root: Path
    model: Model
    tensors: dict[str, TensorInfo]
    pieces: dict[str, list[Piece]]
    checksums: dict[tuple[str, str], str]
    manifest: Manifest | None

    @property
    @abstractmethod
    def degrees(self) -> Degrees:
        """The layout's degrees."""

    @abstractmethod
    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Read a part of a tensor."""

    def tensor(self, name: str) -> LazyTensor:
        """Give a tensor that is read when its numbers are asked for: `[10:20, :4]` cuts it, `numpy()` and `torch()` read.

        Args:
            name: the tensor's hub name; `tensors` has all of them.

        Returns:
            The tensor, unread.

        Raises:
            SourceError: there is no such tensor.

        >>> import moeconv
        >>> head = moeconv.open("ckpt").tensor("lm_head.weight")
        >>> head.dtype, head.shape, head[:8, 4:6].shape
        ('BF16', (64, 32), (8, 2))
        >>> head[:8, 4:6].torch().dtype
        torch.bfloat16
        """
        if name not in self.tensors:
            raise SourceError(f"{self.root}: holds no tensor {name}")
        info = self.tensors[name]
        return LazyTensor(self, name, info.dtype, Rect.whole(info.shape))

    def rank(self, degrees: Degrees | None = None, **coordinates: int) -> dict[str, LazyTensor]:
        """Give what one rank of a layout holds, whatever the layout on disk is.

        Args:
            degrees: the layout; by default the checkpoint's own.
            coordinates: the rank's place, by axis (tp, pp, ep, etp); axes left out are 0, etp that of tp, modulo its degree.

        Returns:
            The rank's part of each tensor by hub name, unread; what other ranks share is among them.

        Raises:
            LayoutError: the model can't be split so, or there is no such rank.

        >>> import moeconv
        >>> part = moeconv.open("mixtral").rank(moeconv.Degrees(tp=2, ep=4, etp=1), tp=1, ep=3)
        >>> part["model.layers.0.self_attn.q_proj.weight"].rect.slices()
        (slice(16, 32, None), slice(0, 32, None))
        >>> sorted(name for name in part if "layers.0" in name and "w1" in name)
        ['model.layers.0.block_sparse_moe.experts.3.w1.weight']
        """
        unknown = sorted(coordinates.keys() - {"tp", "pp", "ep", "etp"})
        if unknown:
            raise LayoutError(f"rank axis {unknown[0]!r} is unknown; axes are tp, pp, ep, etp")
        held = Placement(self.model, degrees or self.degrees).held(**coordinates)
        return {t.name: replace(self.tensor(t.name), rect=rect) for t, rect in held if t.name in self.tensors}

    def load_into(
        self,
        module: nn.Module,
        *,
        degrees: Degrees | None = None,
        rank: Mapping[str, int] | None = None,
        names: Literal["hub", "megatron"] | Mapping[str, str] | Callable[[str], str] = "hub",
        skip: Sequence[str] = (),
    ) -> int:
        """Fill the parameters (and saved buffers) of your own module with this rank's part, straight from the files.

        A parameter that is a DTensor gets the rectangle that its mesh and placements give this process, whether of tensor
        parallelism, FSDP or both. Any other has the shape of the whole tensor or, with `rank`, of that rank's part. Numbers
        are cast to the parameter's own type. What is read whole of a sharded checkpoint is compared with its checksum.

        Args:
            module: the module, not on the device meta; torch's own wrappers (DDP, torch.compile) may be around it.
            degrees: the layout that `rank` belongs to; by default the checkpoint's own.
            rank: this process's coordinates by axis (tp, pp, vpp, ep, etp), such as `{"tp": 1, "ep": 0}`; without, the module
                holds the whole model, or says by DTensors which part.
            names: what the module calls its parameters: as the hub or transformers does, or Megatron-Core's GPTModel; else a
                table or a function from the module's names to those.
            skip: shell-style patterns of parameters that stay as they are, and of tensors that go nowhere.

        Returns:
            Bytes that were read.

        Raises:
            MappingError: a parameter is missing, unexpected or of another shape; the module is as it was.
            LayoutError: the model can't be split so, or there is no such rank; the module is as it was.
            SourceError, IntegrityError: a file can't be read, or is damaged; parameters are filled in part.
            MissingPackageError: torch is not installed.

        >>> import moeconv, transformers
        >>> model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained("mixtral"))
        >>> moeconv.open("ckpt").load_into(model)
        58176
        """
        with needed("filling a module"):
            from moeconv.modules import load_into
        read = VerifiedReader(self).read if self.manifest is not None else self.read
        if rank is None and degrees is not None:
            raise LayoutError(f"degrees {degrees} without a rank; say which one's part the module holds with rank=")
        layout = Degrees() if rank is None else degrees or self.degrees
        return load_into(self, read, module, degrees=layout, rank=rank, names=names, skip=skip)

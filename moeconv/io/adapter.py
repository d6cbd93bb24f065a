"""What the manifest of a save of adapters says of them and of the model that they belong to."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from moeconv.io.decode import Digest, Name


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Low-rank adapters of one rank; which weights they belong to, their tensors' names say."""

    rank: Annotated[int, Meta(ge=1, le=2**20)]
    alpha: Annotated[float, Meta(gt=0)]
    rslora: bool
    dropout: Annotated[float, Meta(ge=0, lt=1)]
    base: Digest
    """The fingerprint of the model that was trained."""
    base_path: Name
    """Where it was."""
    quantize_base: Literal["nf4", "fp8"] | None = None
    """How the model was held while adapters were trained, where it was not held as it is."""
    double_quant: bool = False
    """Whether the scales of nf4 were quantised, too."""

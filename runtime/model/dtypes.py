"""Types that weights and activations can be computed in, by name; without torch, so that flags are parsed quickly."""

from __future__ import annotations

from typing import Literal

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]

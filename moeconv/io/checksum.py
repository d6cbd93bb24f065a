"""The checksum of a checkpoint's bytes: XXH3-128, as a hexadecimal string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xxhash


def new() -> Any:
    """Start a running checksum: it has `update(buffer)` and `hexdigest()`."""
    return xxhash.xxh3_128()


def checksum(data: Any) -> str:
    """Give the checksum of a buffer of bytes."""
    return str(xxhash.xxh3_128_hexdigest(data))


def combined(parts: Iterable[str]) -> str:
    """Give the checksum of a file from those of its header and tensors in file order, so that no byte is read twice."""
    return checksum(b"".join(bytes.fromhex(part) for part in parts))

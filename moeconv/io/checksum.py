"""The checksum of a checkpoint's bytes: XXH3-128, as a hexadecimal string; and CRC-32, which zip archives store."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import xxhash
from zlib_ng import zlib_ng


def new() -> Any:
    """Start a running checksum: it has `update(buffer)` and `hexdigest()`."""
    return xxhash.xxh3_128()


def checksum(data: Any) -> str:
    """Give the checksum of a buffer of bytes."""
    return str(xxhash.xxh3_128_hexdigest(data))


def combined(parts: Iterable[str]) -> str:
    """Give the checksum of a file from those of its header and tensors in file order, so that no byte is read twice."""
    return checksum(b"".join(bytes.fromhex(part) for part in parts))


class Crc32:
    """A running CRC-32 with the methods of a running checksum."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: Any) -> None:
        """Add a buffer of bytes."""
        self.value = zlib_ng.crc32(data, self.value)

    def hexdigest(self) -> str:
        """Give the CRC-32 so far."""
        return f"{self.value:08x}"


def combined_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Give the CRC-32 of data from those of its parts, so that parts can be written in any order.

    Args:
        parts: the CRC-32 and the length in bytes of each part, in order.

    Returns:
        The CRC-32 of all of them one after another: appending n bytes multiplies the CRC by x^(8n) modulo the polynomial.
        Source: https://github.com/madler/zlib/blob/v1.3.1/crc32.c (crc32_combine_).
    """
    crc = 0
    for part, nbytes in parts:
        crc = _multiply(_shift(nbytes), crc) ^ part
    return crc


def _multiply(a: int, b: int) -> int:
    """Multiply polynomials over GF(2) modulo that of CRC-32, the highest power in the lowest bit."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return out


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """Give x^(8 * nbytes)."""
    out, power = 1 << 31, 1 << 23  # 1 and x^8
    while nbytes:
        if nbytes & 1:
            out = _multiply(power, out)
        power, nbytes = _multiply(power, power), nbytes >> 1
    return out

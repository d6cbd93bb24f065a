"""Writing pickles that name classes of projects which need not be installed (torch, Megatron)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.io.unpickle import Symbol


@dataclass(frozen=True, slots=True)
class Call:
    """Calls `function(*args)` on loading; `state`, if not None, is then given to the result (`__setstate__`)."""

    function: Symbol
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, slots=True)
class Instance:
    """Makes `cls.__new__(cls)` on loading and gives it `state`: how a plain object or a dataclass is pickled."""

    cls: Symbol
    state: Any


@dataclass(frozen=True, slots=True)
class Persistent:
    """A persistent id: how torch's archives refer to a storage."""

    value: Any


def dump_pickle(value: Any) -> bytes:
    """Pickle plain data, `Symbol`, `Call`, `Instance` and `Persistent` with protocol 2, which `torch.load` expects.

    Args:
        value: None, bool, int, float, str, list, tuple, dict, and the records of this module, nested.

    Returns:
        The pickle.

    Raises:
        TypeError: a value of another type.
    """
    writer = _Writer()
    writer.save(value)
    return b"\x80\x02" + bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[Symbol | str, int] = {}

    def save(self, value: Any) -> None:
        match value:
            case None:
                self.out += b"N"
            case bool():
                self.out += b"\x88" if value else b"\x89"
            case int():
                self._int(value)
            case float():
                self.out += b"G" + struct.pack(">d", value)
            case str():
                raw = value.encode("utf-8", "surrogatepass")
                self._once(value, b"X" + struct.pack("<I", len(raw)) + raw)
            case Symbol():
                self._once(value, f"c{value.module}\n{value.name}\n".encode())
            case tuple():
                self._sequence(b"(", value, b"t") if len(value) > 3 else self._short_tuple(value)
            case list():
                self.out += b"]"
                if value:
                    self._sequence(b"(", value, b"e")
            case dict():
                self.out += b"}"
                if value:
                    self._sequence(b"(", [x for pair in value.items() for x in pair], b"u")
            case Call(function, args, state):
                self.save(function)
                self.save(args)
                self.out += b"R"
                self._state(state)
            case Instance(cls, state):
                self.save(cls)
                self.out += b")\x81"
                self._state(state)
            case Persistent(inner):
                self.save(inner)
                self.out += b"Q"
            case _:
                raise TypeError(f"no pickle for {type(value).__name__}")

    def _once(self, value: Symbol | str, code: bytes) -> None:
        """Write a name or string the first time, then refer to it: large checkpoints repeat them a thousand times."""
        index = self._memo.get(value)
        if index is not None:
            self.out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
            return
        index = self._memo[value] = len(self._memo)
        self.out += code + (b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw))) + raw

    def _short_tuple(self, value: tuple[Any, ...]) -> None:
        for item in value:
            self.save(item)
        self.out += (b")", b"\x85", b"\x86", b"\x87")[len(value)]

    def _sequence(self, mark: bytes, items: Sequence[Any], end: bytes) -> None:
        self.out += mark
        for item in items:
            self.save(item)
        self.out += end

    def _state(self, state: Any) -> None:
        if state is not None:
            self.save(state)
            self.out += b"b"

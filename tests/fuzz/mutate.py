"""Mutations: of bytes, of JSON as text and as a tree, of pickles by their opcodes, of zip archives by their fields."""

from __future__ import annotations

import copy
import json
import pickletools
import re
import struct
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 3, -1, 4, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**9, 10**30)
NASTY: tuple[Any, ...] = (
    *(None, True, False, 1.5, -0.0, 2.0, 1e308, 1e-300, float("nan"), float("inf")),
    *("", "a", "silu", "\ud800", "\0", "../outside", "/etc/passwd", "a\\b", "x" * 5000, "é", "1"),
    *([], {}, [[]], [0], [-1], ["a"], {"a": {}}, [None], [1, 2, 3, 4, 5], [10**9] * 3, {"": []}),
)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|[\[\]{},:]|true|false|null')
_TEXTS = (
    b"-0",
    b"1e5",
    b"1.0",
    b"00",
    b"NaN",
    b"1" * 5000,
    b"[" * 300,
    b"{}",
    b"[]",
    b"null",
    b'"\\ud800"',
    b'"\\u0000"',
)


def flip_bytes(rng: Random, raw: bytes) -> bytes:
    """Change, insert, remove or repeat some bytes."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                out[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                del out[at : at + rng.randrange(1, 9)]
            case 4:
                begin = rng.randrange(len(out) + 1)
                out[at:at] = out[begin : begin + rng.randrange(1, 64)]
            case 5:
                number = rng.choice(NUMBERS) % 2**64
                size = rng.choice((1, 2, 4, 8))
                out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case _ if rng.random() < 0.1:
                del out[at:]
    return bytes(out)


def mutate_tree(rng: Random, value: Any) -> Any:
    """Change some values, keys or items of a JSON tree."""
    out = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        out = _change(rng, out)
    return out


def _change(rng: Random, root: Any) -> Any:
    places = list(_places(root))
    if not places:
        return nasty(rng)
    holder, key = rng.choice(places)
    others = [(h, k) for h, k in (rng.choice(places) for _ in range(4))]
    match rng.randrange(8):
        case 0 | 1:
            holder[key] = nasty(rng)
        case 2:
            holder[key] = _near(rng, holder[key])
        case 3:
            del holder[key]
        case 4:
            other, name = others[0]
            holder[key] = copy.deepcopy(other[name])
        case 5:
            other, name = others[0]
            holder[key], other[name] = other[name], holder[key]
        case 6 if isinstance(holder, dict):
            holder[rng.choice(("x", "", "../x", "a" * 2000, key + "x"))] = holder.pop(key)
        case 7 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case _:
            other, name = others[1]
            if isinstance(other, dict):
                other[rng.choice(("extra", name + "2"))] = copy.deepcopy(other[name])
    return root


def nasty(rng: Random) -> Any:
    """Give a value that readers trip over."""
    if rng.random() < 0.4:
        return rng.choice(NUMBERS)
    if rng.random() < 0.02:
        deep: Any = 0
        for _ in range(rng.choice((50, 100, 250))):
            deep = [deep] if rng.random() < 0.9 else {"a": deep}
        return deep
    return copy.deepcopy(rng.choice(NASTY))


def _near(rng: Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, float(value), str(value), value // 2, bool(value)))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value[::-1], "../" + value, "/" + value, [value]))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, int(value) if abs(value) < 1e18 else 0, str(value)))
    return rng.choice((None, [value], {}))


def _places(value: Any, limit: int = 2000) -> Any:
    """Give every (container, key) of a tree."""
    todo = [value]
    while todo and limit:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            limit -= 1
            yield item, key
            if isinstance(item[key], dict | list):
                todo.append(item[key])


def encode_json(rng: Random, value: Any) -> bytes:
    """Write a tree as JSON, now and then in another encoding, or with a key twice."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
        raw = text.encode("utf-8", "surrogatepass")
    except RecursionError:
        raw = b"[" * 5000
    if rng.random() < 0.01:
        return rng.choice(
            (raw.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + raw, raw + b"x", b" " + raw)
        )
    return raw


def mutate_tokens(rng: Random, raw: bytes) -> bytes:
    """Change JSON as text: tokens that are removed, repeated, exchanged or replaced."""
    tokens = [m.span() for m in _TOKEN.finditer(raw)]
    if not tokens:
        return flip_bytes(rng, raw)
    out = raw
    for _ in range(rng.choice((1, 1, 2))):
        begin, end = rng.choice(tokens)
        begin, end = min(begin, len(out)), min(end, len(out))
        other = rng.choice(tokens)
        new = (b"", out[begin:end] * 2, out[other[0] : other[1]], rng.choice(_TEXTS))[rng.randrange(4)]
        out = out[:begin] + new + out[end:]
    return out


def mutate_json(rng: Random, raw: bytes, tree: Any) -> bytes:
    """Mutate a JSON file, given as bytes and as the tree that it is."""
    choice = rng.random()
    if choice < 0.7:
        return encode_json(rng, mutate_tree(rng, tree))
    return mutate_tokens(rng, raw) if choice < 0.9 else flip_bytes(rng, raw)


# Opcodes that call, refer, repeat or reserve; each is inserted as it is.
_OPCODES = (
    *(
        b"N",
        b"\x88",
        b"]",
        b"}",
        b")",
        b"(",
        b"t",
        b"l",
        b"d",
        b"e",
        b"u",
        b"s",
        b"a",
        b"0",
        b"1",
        b"2",
        b".",
        b"\x8f",
        b"\x91",
    ),
    *(b"R", b"b", b"\x81", b"\x92", b"o", b"Q", b"\x93", b"\x94", b"\x85", b"\x86", b"\x87", b"\x90", b"\x97", b"\x98"),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nload\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ios\nsystem\n",
    ),
    *(b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n", b"Pos\n"),
    *(
        b"K\x00",
        b"K\x01",
        b"J\xff\xff\xff\xff",
        b"M\xff\xff",
        b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
        b"G\x7f\xf8" + b"\0" * 6,
    ),
    *(
        b"I99\n",
        b"L" + b"9" * 5000 + b"L\n",
        b"Fnan\n",
        b"S'a'\n",
        b"Va\n",
        b"X\x01\x00\x00\x00a",
        b"\x8c\x02\xc3\xa9",
        b"U\x01a",
    ),
    *(
        b"h\x00",
        b"h\x01",
        b"j\x00\x01\x00\x00",
        b"q\x00",
        b"r\xff\xff\xff\x0f",
        b"r\x00\x00\x00\x00",
        b"p9999\n",
        b"g0\n",
    ),
    *(
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00",
        b"\x80\x06",
        b"\x95" + b"\xff" * 8,
        b"\x8d" + b"\xff" * 8,
        b"B\xff\xff\xff\x7f",
    ),
    b"]q\x00"
    + b"".join(b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e" for i in range(1, 40)),
    b")q\x00" + b"".join(b"h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"\x86q" + bytes([i]) for i in range(1, 40)),
)


@lru_cache(64)
def _bounds(raw: bytes) -> list[int]:
    """Give where each opcode begins, and the end."""
    return [*(position for _, _, position in pickletools.genops(raw) if position is not None), len(raw)]


def mutate_pickle(rng: Random, raw: bytes) -> bytes:
    """Remove, repeat, exchange or insert opcodes, or change their arguments."""
    if rng.random() < 0.25:
        return flip_bytes(rng, raw)
    bounds = _bounds(raw)
    ops = [raw[a:b] for a, b in pairwise(bounds)]
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(ops))
        match rng.randrange(6):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, ops[rng.randrange(len(ops))])
            case 2:
                other = rng.randrange(len(ops))
                ops[at], ops[other] = ops[other], ops[at]
            case 3 | 4:
                ops.insert(at, rng.choice(_OPCODES))
            case _ if len(ops[at]) > 1:
                ops[at] = ops[at][:1] + flip_bytes(rng, ops[at][1:])
        if not ops:
            break
    return b"".join(ops)


def mutate_in_pickle(rng: Random, raw: bytes) -> bytes:
    """Mutate bytes where an archive's pickle is; it keeps its length, so that the zip stays whole."""
    begin = raw.index(b"\x80\x02")
    end = raw.index(b"PK", begin + 1000)
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(begin, end)
        out[at] = rng.choice((rng.randrange(256), out[at] ^ 1, *b"(.0]}RQq"))
    return bytes(out)


_SIGNATURES = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")


def mutate_zip(rng: Random, raw: bytes) -> bytes:
    """Change fields and names in the headers of an archive, where most of its bytes are data."""
    out = bytearray(raw)
    signature = rng.choice(_SIGNATURES[:3])
    places = [m.start() for m in re.finditer(re.escape(signature), raw)]
    if not places or rng.random() < 0.15:
        return flip_bytes(rng, raw)
    for _ in range(rng.choice((1, 1, 2))):
        begin = rng.choice(places)
        length = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}[signature] + rng.choice((0, 0, 16))
        at = begin + rng.randrange(length)
        size = rng.choice((1, 2, 2, 4, 4, 8))
        number = rng.choice((*NUMBERS, len(raw), begin, rng.randrange(2**16))) % 2 ** (8 * size)
        out[at : at + size] = number.to_bytes(size, "little")
    if rng.random() < 0.1:
        begin = rng.choice(places)
        out[begin:begin] = out[begin : begin + rng.randrange(1, 100)]
    return bytes(out)


def header_bytes(text: bytes) -> bytes:
    """Put the length before a safetensors header."""
    return struct.pack("<Q", len(text)) + text

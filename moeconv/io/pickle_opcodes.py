"""The opcodes of pickles, of all protocols: what each does to the machine.

Source: https://github.com/python/cpython/blob/v3.11.7/Lib/pickletools.py (opcodes).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from struct import unpack_from
from typing import Any

from moeconv.io.pickle_machine import Machine, RefusedError

_STOP, _BININT1, _MEMOIZE = ord("."), ord("K"), 0x94
_BINGET, _LONG_BINGET, _BINPUT, _LONG_BINPUT = b"hjqr"


def run(machine: Machine) -> Any:
    """Run a pickle to its end.

    Args:
        machine: the machine, with the pickle's bytes.

    Returns:
        What the pickle holds.

    Raises:
        RefusedError, IndexError, ValueError, KeyError: the pickle is damaged or no data.
    """
    data, stack, memo, table, at = machine.data, machine.stack, machine.memo, _TABLE, 0
    end = len(data)
    while at < end:
        code = data[at]
        at += 1
        # Nine of ten opcodes are these: here, since a call costs more than what they do. Past the end the loop ends.
        if code == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif code == _BININT1:
            stack.append(data[at])
            at += 1
        elif code == _BINGET:
            stack.append(memo[data[at]])
            at += 1
        elif code == _LONG_BINGET:
            stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif code == _BINPUT:
            memo[data[at]] = stack[-1]
            at += 1
        elif code == _LONG_BINPUT:
            memo[int.from_bytes(data[at : at + 4], "little")] = stack[-1]
            at += 4
        elif code == _STOP:
            return machine.result()
        else:
            machine.at = at
            table[code](machine)
            at = machine.at
    raise RefusedError(f"it is cut off at byte {end}")


Step = Callable[[Machine], None]


def _push(read: Callable[[Machine], Any]) -> Step:
    return lambda m: m.stack.append(read(m))


def _sized(width: int, convert: Callable[[bytes], Any]) -> Step:
    return _push(lambda m: convert(m.take(m.number(width))))


def _fixed(form: str, size: int) -> Step:
    return _push(lambda m: unpack_from(form, m.take(size))[0])


def _since(use: Callable[[Machine, list[Any]], None]) -> Step:
    """Make a step of what uses the items since the mark."""

    def step(m: Machine) -> None:
        items = m.since_mark()
        use(m, items)

    return step


def _refuse(what: str) -> Step:
    def step(m: Machine) -> None:
        raise RefusedError(what)

    return step


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.since_mark()


def _tuple(count: int) -> Step:
    def step(m: Machine) -> None:
        if len(m.stack) < count:
            raise RefusedError("a tuple has too few items")
        items = tuple(m.stack[-count:])
        del m.stack[-count:]
        m.stack.append(items)

    return step


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items([key, value])


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.append([value])


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _line_int(m: Machine) -> int | bool:
    text = m.line()
    return text == "01" if text in ("00", "01") else int(text)


def _line_string(m: Machine) -> str:
    text = m.line()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise RefusedError("a string has no quotes")
    return codecs.escape_decode(text[1:-1].encode())[0].decode()


_CODE = "it names a class by a number that only the program that wrote it knows"
_STEPS: dict[int, Step] = {
    0x80: Machine.proto,
    0x95: Machine.frame,
    ord("("): Machine.mark,
    ord("0"): _pop,
    ord("1"): _since(lambda m, items: None),
    ord("2"): _push(lambda m: m.stack[-1]),
    # What was remembered, as text; the others are in the loop above.
    ord("p"): lambda m: m.put(int(m.line())),
    ord("g"): lambda m: m.get(int(m.line())),
    # Numbers and strings.
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_line_int),
    ord("L"): _push(lambda m: int(m.line().removesuffix("L"))),
    ord("F"): _push(lambda m: float(m.line())),
    ord("J"): _push(lambda m: _signed(m.take(4))),
    ord("M"): _push(lambda m: m.number(2)),
    ord("G"): _fixed(">d", 8),
    0x8A: _sized(1, _signed),
    0x8B: _sized(4, _signed),
    ord("S"): _push(_line_string),
    ord("T"): _sized(4, bytes.decode),
    ord("U"): _sized(1, bytes.decode),
    ord("B"): _sized(4, bytes),
    ord("C"): _sized(1, bytes),
    0x8E: _sized(8, bytes),
    0x96: _sized(8, bytes),
    ord("V"): _push(lambda m: m.raw_line().decode("raw-unicode-escape")),
    ord("X"): _sized(4, _text),
    0x8C: _sized(1, _text),
    0x8D: _sized(8, _text),
    # Collections.
    ord(")"): _push(lambda m: ()),
    ord("t"): _since(lambda m, items: m.stack.append(tuple(items))),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("]"): _push(lambda m: []),
    ord("l"): _since(lambda m, items: m.stack.append(items)),
    ord("a"): _append,
    ord("e"): _since(Machine.append),
    ord("}"): _push(lambda m: {}),
    ord("d"): _since(Machine.dict_of),
    ord("s"): _set_item,
    ord("u"): _since(Machine.set_items),
    0x8F: _push(lambda m: set()),
    0x90: _since(Machine.add),
    0x91: _since(lambda m, items: m.add(items, frozen=True)),
    # Names, and what becomes a record.
    ord("c"): lambda m: m.symbol(m.line(), m.line()),
    0x93: Machine.stack_symbol,
    ord("R"): Machine.reduce,
    0x81: Machine.new,
    0x92: Machine.new_with_names,
    ord("o"): Machine.instance,
    ord("i"): Machine.named_instance,
    ord("b"): Machine.build,
    ord("Q"): Machine.persistent,
    ord("P"): _refuse("its persistent id is not that of a torch storage"),
    0x82: _refuse(_CODE),
    0x83: _refuse(_CODE),
    0x84: _refuse(_CODE),
    0x97: _refuse("it refers to buffers outside"),
    0x98: _refuse("it refers to buffers outside"),
}
_TABLE: list[Step] = [_STEPS.get(code, _refuse(f"byte {code:#x} is no opcode")) for code in range(256)]

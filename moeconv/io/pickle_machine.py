"""The machine that pickles are programs for, without the part that imports and calls: what a pickle wants called becomes a record.

Every step is bounded: nothing is hashed, copied or reserved that is larger than the bytes that were read for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_KEY_ITEMS = 64
_MAX_KEY = 1 << 53  # whole numbers below have hashes of their own, so that no dict becomes slow


class RefusedError(Exception):
    """A pickle that is damaged, or no data."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a class, function or constant that a pickle mentions without calling it, such as `torch.bfloat16`."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """What a pickle said to build from a class that is not imported here: its name, the arguments and the state."""

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.module, self.name, self.args = module, name, args
        self.state: Any = None
        self.items: dict[Any, Any] | None = None

    def get(self, field: str, default: Any = None) -> Any:
        """Give a field of the object's state, as `object.__dict__` would have it."""
        return self.state.get(field, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}>"


class OrderedTable(dict[Any, Any]):
    """An OrderedDict: torch hangs `_metadata` on it as an attribute, which is left out."""


class Machine:
    """A pickle being read: its bytes, the stack, and what is remembered; `moeconv.io.pickle_opcodes` drives it.

    `find(module, name)` gives the symbol of an allowed name, `call(symbol, args)` what it makes of arguments (None: a
    record), `persistent(pid)` what a persistent id stands for; each raises RefusedError for what it doesn't know.
    """

    def __init__(
        self,
        data: bytes,
        find: Callable[[str, str], Symbol],
        call: Callable[[Symbol, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._marks: list[int] = []
        self._find, self._call, self._persistent = find, call, persistent

    def result(self) -> Any:
        """Give what is left on the stack at the end."""
        if self._marks or len(self.stack) != 1:
            raise RefusedError("it ends in the middle")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """Give the next bytes."""
        end = self.at + count
        if end > len(self.data):
            raise RefusedError(f"it is cut off at byte {len(self.data)}")
        out = self.data[self.at : end]
        self.at = end
        return out

    def number(self, count: int) -> int:
        """Give the next `count` bytes as an unsigned number."""
        return int.from_bytes(self.take(count), "little")

    def raw_line(self) -> bytes:
        """Give the bytes up to the next newline."""
        end = self.data.index(b"\n", self.at)
        out, self.at = self.data[self.at : end], end + 1
        return out

    def line(self) -> str:
        """Give the text up to the next newline."""
        return self.raw_line().decode()

    def since_mark(self) -> list[Any]:
        """Give what was pushed since the last mark, and take it off the stack."""
        if not self._marks or self._marks[-1] > len(self.stack):
            raise RefusedError("a list ends that did not begin")
        begin = self._marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def mark(self) -> None:
        """Begin a list of things to be taken together."""
        self._marks.append(len(self.stack))

    def put(self, index: int) -> None:
        """Remember the top of the stack."""
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Push what was remembered."""
        self.stack.append(self.memo[index])

    def frame(self) -> None:
        """Check a frame's length."""
        if self.number(8) > len(self.data) - self.at:
            raise RefusedError("a frame reaches past its end")

    def proto(self) -> None:
        """Check the protocol's number."""
        if self.number(1) > 5:
            raise RefusedError("it is of a later protocol")

    def append(self, items: list[Any]) -> None:
        """Add items to the list on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):  # the items of a list of some class, which nothing reads
            raise RefusedError(f"it adds items to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values, in turn, to the dict on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Opaque):
            if target.items is None:
                target.items = {}
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedError(f"it sets items of a {type(target).__name__}")
        pairs = iter(items)
        for key, value in zip(pairs, pairs, strict=True):
            check_key(key)
            target[key] = value

    def add(self, items: list[Any], *, frozen: bool = False) -> None:
        """Add items to the set on top of the stack, or push a frozen one."""
        for item in items:
            check_key(item)
        if frozen:
            self.stack.append(frozenset(items))
        elif isinstance(self.stack[-1], set):
            self.stack[-1].update(items)
        else:
            raise RefusedError(f"it adds members to a {type(self.stack[-1]).__name__}")

    def dict_of(self, items: list[Any]) -> None:
        """Push a dict of keys and values in turn."""
        self.stack.append({})
        self.set_items(items)

    def symbol(self, module: Any, name: Any) -> None:
        """Push the symbol of a name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("it calls for something that is no name")
        self.stack.append(self._find(module, name))

    def stack_symbol(self) -> None:
        """Push the symbol of the two names on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.symbol(module, name)

    def make(self, function: Any, args: Any, *, call: bool) -> None:
        """Push what a symbol makes of arguments: by a call, or as a new object of its class."""
        if not isinstance(args, tuple) or not isinstance(function, Symbol | Opaque):
            raise RefusedError(f"it calls a {type(function).__name__}")
        made = self._call(function, args) if call and isinstance(function, Symbol) else None
        self.stack.append(Opaque(function.module, function.name, args) if made is None else made)

    def reduce(self) -> None:
        """Push what the symbol below makes of the arguments on top."""
        args, function = self.stack.pop(), self.stack.pop()
        self.make(function, args, call=True)

    def new(self) -> None:
        """Push a new object of the class below, with the arguments on top."""
        args, cls = self.stack.pop(), self.stack.pop()
        self.make(cls, args, call=False)

    def new_with_names(self) -> None:
        """Push a new object with positional and named arguments."""
        named, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(named, dict) or not isinstance(args, tuple):
            raise RefusedError("an object's named arguments are no dict")
        self.make(cls, (*args, named) if named else args, call=False)

    def instance(self) -> None:
        """Push a new object, by the old opcodes."""
        items = self.since_mark()
        self.make(items[0], tuple(items[1:]), call=True)

    def named_instance(self) -> None:
        """Push a new object of the class whose name follows."""
        self.symbol(self.line(), self.line())
        function = self.stack.pop()
        self.make(function, tuple(self.since_mark()), call=True)

    def build(self) -> None:
        """Give the object below its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif isinstance(target, Symbol):
            raise RefusedError(f"state for the function {target}")
        elif not isinstance(target, OrderedTable):
            raise RefusedError(f"state for a {type(target).__name__}")

    def persistent(self) -> None:
        """Replace a persistent id by what it stands for."""
        self.stack.append(self._persistent(self.stack.pop()))


def check_key(key: Any) -> None:
    """Check that a key or member can be hashed at once: a name, a number, a record, or a short tuple of those."""
    if type(key) in (str, Opaque):
        return
    left = MAX_KEY_ITEMS
    todo = [key]
    while todo:
        item, left = todo.pop(), left - 1
        if left < 0:
            raise RefusedError(f"a key holds more than {MAX_KEY_ITEMS} items")
        if isinstance(item, tuple):
            if len(item) > left:
                raise RefusedError(f"a key holds more than {MAX_KEY_ITEMS} items")
            todo.extend(item)
        elif isinstance(item, int):
            if abs(item) >= _MAX_KEY:
                raise RefusedError("a key is a number of more than 53 bits")
        elif item is not None and not isinstance(item, str | bytes | Symbol | Opaque):
            raise RefusedError(f"a key is a {type(item).__name__}")

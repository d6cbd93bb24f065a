"""Reading pickles as data: nothing in them is imported or called.

A pickle is a program that names callables and calls them. Here a named callable becomes an inert object that only
records what the pickle wanted: `torch.Size` gives a tuple, a torch tensor gives a `TensorRef`, an unknown class of a
known project (an enum of Megatron in a genuine `args`) gives an `Opaque`, and a name outside those projects
(`os.system`) is an error.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeconv.errors import SourceError

# Names that checkpoints hold besides tensors: dtypes and enums of these projects, records of the standard library.
_INERT_ROOTS = {"torch", "megatron", "megatron_fsdp", "transformer_engine", "transformer_engine_torch", "apex", "numpy"}
_INERT_ROOTS |= {"transformers", "argparse", "collections", "copyreg", "copy_reg", "datetime", "enum"}
_INERT_ROOTS |= {"pathlib", "signal", "types"}
_INERT_BUILTINS = {"set", "frozenset", "slice", "complex", "bytearray", "object", "getattr", "int", "float", "bool"}
_INERT_BUILTINS |= {"str", "bytes", "list", "dict", "tuple"}

# The names of torch.dtype, and the storage classes that torch.save writes for them.
# Source: https://github.com/pytorch/pytorch/blob/v2.10.0/torch/storage.py (_dtype_to_storage_type_map).
TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage that a pickle refers to: its record's key in the archive, safetensors dtype and number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A strided view of a storage: element offset, shape and strides (in elements); `dtype` is a safetensors name."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a class, function or constant that a pickle mentions without calling it, such as `torch.bfloat16`."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """What a pickle said to build from a class that is not imported here: its name, the arguments and the state."""

    __slots__ = ("args", "items", "state")
    module = name = "?"

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any] | None

    def __new__(cls, *args: Any) -> Opaque:
        """Take any arguments; pickles make objects both by calling a class and by its `__new__` alone."""
        made = object.__new__(cls)
        made.args, made.state, made.items = args, None, None
        return made

    def __init__(self, *args: Any) -> None:
        """Take any arguments; `__new__` kept them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items = self.items or {}
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keep an item of a list subclass; nothing reads it."""

    def get(self, field: str, default: Any = None) -> Any:
        """Give a field of the object's state, as `object.__dict__` would have it."""
        return self.state.get(field, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}>"


class _AttributeDict(dict[Any, Any]):
    """An OrderedDict: torch hangs `_metadata` on it as an attribute."""


class _Function:
    """A callable that find_class may hand out; it holds no state that a pickle's BUILD could change."""

    __slots__ = ("_call", "symbol")

    def __init__(self, symbol: Symbol, call: Callable[..., Any]) -> None:
        self.symbol, self._call = symbol, call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"state for the function {self.symbol}")


Shape = tuple[int, ...]


def _tensor(storage: StorageRef, offset: int, shape: Shape, strides: Shape, *_: Any) -> TensorRef:
    return TensorRef(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_v3(
    storage: StorageRef, offset: int, shape: Shape, strides: Shape, _grad: Any, _hooks: Any, dtype: Symbol, *_: Any
) -> TensorRef:
    return TensorRef(storage, TORCH_DTYPES[dtype.name], offset, tuple(shape), tuple(strides))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda items=(): _AttributeDict(items),
}


class DataUnpickler(pickle.Unpickler):
    """An unpickler that builds plain data and inert records only; see the module's docstring."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._where = where
        self._seen: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Hand out the inert stand-in of a name; the same one each time."""
        key = (module, name)
        if key not in self._seen:
            self._seen[key] = self._stand_in(module, name)
        return self._seen[key]

    def _stand_in(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _Function(Symbol(module, name), _FUNCTIONS[module, name])
        if module == "torch" and (name in TORCH_DTYPES or name in STORAGE_TYPES):
            return Symbol(module, name)
        if module == "torch.storage" and name in STORAGE_TYPES:
            return Symbol("torch", name)
        root = module.partition(".")[0]
        if (
            (module in ("io", "_io") and name == "BytesIO")
            or root in _INERT_ROOTS
            or (module in ("builtins", "__builtin__") and name in _INERT_BUILTINS)
        ):
            return type(name.rpartition(".")[2], (Opaque,), {"__slots__": (), "module": module, "name": name})
        raise pickle.UnpicklingError(f"it calls for {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> StorageRef:
        """Read a torch storage's persistent id: ("storage", type, key, device, number of elements)."""
        match pid:
            case ("storage", Symbol(module="torch", name=name), str(key), _, int(numel)) if name in STORAGE_TYPES:
                return StorageRef(key, STORAGE_TYPES[name], numel)
        raise pickle.UnpicklingError(f"its persistent id {str(pid)[:120]} is not that of a torch storage")


def load_pickle(data: bytes, where: str) -> Any:
    """Read a pickle as data.

    Args:
        data: the whole pickle.
        where: what it is part of, for messages.

    Returns:
        Dicts, lists, tuples, numbers and strings; `TensorRef`, `Symbol` and `Opaque` for the rest.

    Raises:
        SourceError: it is damaged, or asks for something outside the projects that write checkpoints.
    """
    try:
        return DataUnpickler(data, where).load()
    except (RecursionError, MemoryError):
        raise SourceError(f"{where}: its pickle nests or grows without bound; it is not a checkpoint") from None
    except Exception as error:  # a damaged pickle can raise anything; nothing of it was executed
        raise SourceError(
            f"{where}: its pickle can't be read as data: {error}; moeconv never executes a pickle"
        ) from None

"""Reading pickles as data: nothing in them is imported or called.

A pickle is a program that names callables and calls them. Here a machine of our own runs it, which can do neither: a
name stays a `Symbol`, and calling one records what the pickle wanted. `torch.Size` gives a tuple, a torch tensor gives a
`TensorRef`, an unknown class of a known project (an enum of Megatron in a genuine `args`) gives an `Opaque`, and a name
outside those projects (`os.system`) is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moeconv.errors import SourceError
from moeconv.io.decode import MAX_DIMS, MAX_NAME_CHARS, brief
from moeconv.io.pickle_machine import Machine, Opaque, OrderedTable, RefusedError, Symbol, check_key
from moeconv.io.pickle_opcodes import run

__all__ = ["Opaque", "StorageRef", "Symbol", "TensorRef", "load_pickle"]

# The pickles of real checkpoints have some MB, the `.metadata` of the largest some hundred.
MAX_PICKLE_BYTES = 512 << 20
MAX_OBJECTS, _SMALL = 50_000_000, 16 << 20
_MAKERS = (
    b"]",
    b"}",
    b"(",
    b"R",
    b"t",
    b"\x81",
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x8f",
)  # opcodes of a byte that make objects
_MAX_LEVELS = 128
_MAX_COUNT = 1 << 62

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


def _counts(value: Any) -> tuple[int, ...]:
    """Check sizes, strides or positions, in elements."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise RefusedError(f"a tensor has the sizes {brief(value)}")
    for n in value:
        if type(n) is not int or not 0 <= n <= _MAX_COUNT:
            raise RefusedError(f"a tensor has the sizes {brief(value)}")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _tensor(*args: Any) -> TensorRef:
    """`_rebuild_tensor_v2(storage, storage_offset, size, stride, ...)`."""
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, StorageRef) or not _is_count(offset) or len(_counts(shape)) != len(_counts(strides)):
        raise RefusedError(f"a tensor is malformed: {brief(args)}")
    return TensorRef(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(*args: Any) -> TensorRef:
    """`_rebuild_tensor_v3(storage, storage_offset, size, stride, requires_grad, hooks, dtype, ...)`: of an untyped storage."""
    ref, kind = _tensor(*args), args[6]
    if not isinstance(kind, Symbol) or kind.module != "torch" or kind.name not in TORCH_DTYPES:
        raise RefusedError(f"a tensor has the dtype {brief(kind)}")
    return replace(ref, dtype=TORCH_DTYPES[kind.name])


def _parameter(*args: Any) -> TensorRef:
    if not isinstance(args[0], TensorRef):
        raise RefusedError("a parameter holds no tensor")
    return args[0]


def _size(*args: Any) -> tuple[int, ...]:
    return _counts(args[0]) if args else ()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str):
        raise RefusedError("it encodes something that is no text")
    return text.encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


def _ordered(items: Any = ()) -> OrderedTable:
    out = OrderedTable()
    for pair in items if isinstance(items, list | tuple) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RefusedError("an OrderedDict is made of something else than pairs")
        check_key(pair[0])
        out[pair[0]] = pair[1]
    return out


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): _size,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
}


def _find(module: str, name: str) -> Symbol:
    """Give the symbol of a name, if checkpoints hold such."""
    if module == "torch.storage" and name in STORAGE_TYPES:
        return Symbol("torch", name)
    inert = (module, name) in _FUNCTIONS or module.partition(".")[0] in _INERT_ROOTS
    inert = inert or (module in ("io", "_io") and name == "BytesIO")
    if not inert and not (module in ("builtins", "__builtin__") and name in _INERT_BUILTINS):
        raise RefusedError(f"it calls for {module[:100]}.{name[:100]}, which no checkpoint needs")
    return Symbol(module, name)


def _call(symbol: Symbol, args: tuple[Any, ...]) -> Any:
    function = _FUNCTIONS.get((symbol.module, symbol.name))
    return None if function is None else function(*args)


def _persistent(pid: Any) -> StorageRef:
    """Read a torch storage's persistent id: ("storage", type, key, device, number of elements)."""
    match pid:
        case ("storage", Symbol(module="torch", name=name), str(key), _, numel) if (
            name in STORAGE_TYPES and _is_count(numel) and len(key) <= MAX_NAME_CHARS
        ):
            return StorageRef(key, STORAGE_TYPES[name], numel)
    raise RefusedError(f"its persistent id {brief(pid)} is not that of a torch storage")


def load_pickle(data: bytes, where: str) -> Any:
    """Read a pickle as data.

    Args:
        data: the whole pickle.
        where: what it is part of, for messages.

    Returns:
        Dicts, lists, tuples, numbers and strings; `TensorRef`, `Symbol` and `Opaque` for the rest. Dicts, lists and
        tuples hold themselves nowhere, are at most 128 levels deep, and written out are not much larger than the pickle.

    Raises:
        SourceError: it is damaged, or asks for something outside the projects that write checkpoints.
    """
    try:
        if len(data) > MAX_PICKLE_BYTES:
            raise RefusedError(f"it has {len(data):,} bytes; such pickles have at most {MAX_PICKLE_BYTES:,}")
        if len(data) > _SMALL and sum(map(data.count, _MAKERS)) > MAX_OBJECTS:
            raise RefusedError(f"it makes more than {MAX_OBJECTS:,} objects")
        root = run(Machine(data, _find, _call, _persistent))
        _Measure(1_000_000 + 4 * len(data)).of(root)
        return root
    except RefusedError as error:
        reason = str(error)
    except MemoryError:
        reason = "it takes more memory than there is"
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"it is damaged ({type(error).__name__}: {str(error)[:200]})"
    raise SourceError(f"{where}: its pickle can't be read as data: {reason}; moeconv never executes a pickle")


class _Measure:
    """Checks that what a pickle holds can be walked through: no collection inside itself, few levels, no endless repetition.

    A list that holds another one twice, forty times over, is some hundred bytes of pickle and a tree of 2^40 items.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[int, tuple[int, int] | None] = {}

    def of(self, value: Any) -> tuple[int, int]:
        """Give the number of items below a value, and of levels.

        Raises:
            RefusedError: there are too many, or the value holds itself.
        """
        if isinstance(value, dict):
            below = [x for x in value.values() if isinstance(x, _NESTED)]
            size = len(value)
        elif isinstance(value, list | tuple):
            below, size = [x for x in value if isinstance(x, _NESTED)], len(value)
        elif isinstance(value, Opaque):
            below, size = [x for x in (value.args, value.state, value.items) if isinstance(x, _NESTED)], 1
        else:
            return 1, 0
        if not below:
            return 1 + size, 1
        key = id(value)
        if key in self._known:
            found = self._known[key]
            if found is None and not isinstance(value, Opaque):
                raise RefusedError("a list, tuple or dict holds itself")
            return found or (1, 1)  # a record may refer to itself: nothing looks through records
        self._known[key] = None
        levels = 0
        for inner in below:
            inner_size, inner_levels = self.of(inner)
            size, levels = size + inner_size, max(levels, inner_levels)
            if size > self._limit:
                raise RefusedError("it repeats itself without bound")
        if levels >= _MAX_LEVELS:
            raise RefusedError(f"it is more than {_MAX_LEVELS} levels deep")
        self._known[key] = 1 + size, 1 + levels
        return 1 + size, 1 + levels


_NESTED = (dict, list, tuple, Opaque)

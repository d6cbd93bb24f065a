"""Megatron's `args`, the namespace of a run's arguments in its checkpoints, as data of checked types.

Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a64/megatron/training/arguments.py (types and meanings).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.sizes import MAX_EXPERTS, MAX_LAYERS
from moeconv.io.unpickle import Opaque

_LARGEST = 2**40
_SHOWN = 80


class RunArgs:
    """The `args` of a checkpoint that was read; absent arguments are None.

    Whatever is asked for as a number, a truth value or a text is one, or a MappingError names the argument with its value.
    """

    def __init__(self, args: Any) -> None:
        state = args.state if isinstance(args, Opaque) else args
        self.values: Mapping[str, Any] = state if isinstance(state, dict) else {}
        for name in self.values:
            if not isinstance(name, str):
                raise MappingError(
                    f"the checkpoint's args hold {shown(name)}, which is no argument's name; they are damaged"
                )

    def __bool__(self) -> bool:
        return bool(self.values)

    def get(self, name: str, default: Any = None) -> Any:
        """Give an argument's value, or the default where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> int:
        """Give a whole number.

        Args:
            name: the argument.
            default: its value where it is absent or None.
            least: the smallest value that means something.
            most: the largest one.

        Returns:
            The number.

        Raises:
            MappingError: the argument is absent and has no default, or is no whole number from `least` to `most`.
        """
        value = self.get(name, default)
        if value is None:
            raise MappingError(f"the checkpoint's args lack {name}; give the model's own config.json with --hf-config")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return self.whole("num_layers", most=MAX_LAYERS)

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer, 0 where there are none."""
        return self.whole("num_experts", 0, least=0, most=MAX_EXPERTS)

    def number(self, name: str, default: float, *, above: float = 0.0) -> float:
        """Give a number above `above`; see `whole`.

        Raises:
            MappingError: the argument is no such number, or not finite.
        """
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -_LARGEST <= value <= _LARGEST:
            raise self.wrong(name, "a number")
        if not isfinite(value) or value <= above:
            raise self.wrong(name, f"a number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Give a truth value; see `whole`.

        Raises:
            MappingError: the argument is none.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Give a text; see `whole`.

        Raises:
            MappingError: the argument is none.
        """
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def wholes(self, name: str, length: int) -> tuple[int, ...] | None:
        """Give a list of whole numbers, None where the argument is absent; see `whole`.

        Raises:
            MappingError: the argument is no such list of this length.
        """
        value = self.get(name)
        if value is None:
            return None
        right = isinstance(value, list | tuple) and len(value) == length
        if not right or not all(isinstance(v, int) and -1 <= v <= _LARGEST for v in value):
            raise self.wrong(name, f"{length} whole numbers")
        return tuple(int(v) for v in value)

    def degree(self, name: str) -> int:
        """Give a degree of parallelism, 1 where it is absent."""
        return self.whole(name, 1)

    def wrong(self, name: str, expected: str) -> MappingError:
        """Make the error of an argument that means nothing."""
        return MappingError(
            f"the checkpoint's args say {name} = {shown(self.values.get(name))}; expected {expected}. If the args are "
            "damaged, pass the right config.json with --hf-config and --ignore-args"
        )


def shown(value: Any) -> str:
    """Give a value of an untrusted file as a short text."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, int | float | str | None):
        return repr(value)[:_SHOWN]
    if isinstance(value, list | tuple) and all(isinstance(v, int | float | str | None) for v in value[:9]):
        return f"[{', '.join(map(shown, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return f"a {type(value).__name__}"

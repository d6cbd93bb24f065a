"""Degrees of parallelism: how many ranks share a model along each axis, and which layers each pipeline stage holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from moeconv.errors import LayoutError

MAX_DEGREE = 1_000_000  # more ranks than any machine has
_NAMES = ("tp", "pp", "vpp", "ep", "etp")
# What a program calls the degrees; the command line of the converter is the default.
OPTIONS = {axis: f"--{axis}" for axis in _NAMES} | {"pp_layers": "--pp-layers"}


class DegreesError(LayoutError):
    """Degrees that don't fit, said in the option names of whichever program was called."""

    def __init__(self, template: str) -> None:
        """Keep the message.

        Args:
            template: the message, in which `<tp>`, `<pp_layers>` and so on stand for the options' names.
        """
        self.template = template
        super().__init__(self.say(OPTIONS))

    def say(self, options: Mapping[str, str]) -> str:
        """Give the message in a program's own words.

        Args:
            options: tp, pp, vpp, ep, etp and pp_layers -> the option's name.
        """
        return re.sub(r"<(tp|pp|vpp|ep|etp|pp_layers)>", lambda found: options[found[1]], self.template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """The degrees of a layout.

    `etp` defaults to `tp`. `pp_layers`, if given, says how many layers each stage holds, in the order of the model: `pp` numbers,
    or `pp * vpp` where stages are virtual. Virtual stage v of rank p is chunk `v * pp + p` of the model.
    """

    tp: int = 1
    "Tensor parallel degree of attention, embeddings and output head."
    pp: int = 1
    "Pipeline parallel degree."
    vpp: int = 1
    "Virtual pipeline stages a rank (interleaved schedule)."
    ep: int = 1
    "Expert parallel degree: experts are split into contiguous blocks."
    etp: int = field(default=0)
    "Tensor parallel degree inside an expert; 0 stands for tp."
    pp_layers: tuple[int, ...] | None = None
    "Layers of each stage, where they are not all the same."

    def __post_init__(self) -> None:
        if self.etp == 0:
            object.__setattr__(self, "etp", self.tp)
        for name in _NAMES:
            if not 1 <= getattr(self, name) <= MAX_DEGREE:
                raise DegreesError(
                    f"<{name}> {str(getattr(self, name))[:40]}: a degree is at least 1 and at most {MAX_DEGREE:,}"
                )
        if self.vpp > 1 and self.pp == 1:
            raise DegreesError(
                f"<vpp> {self.vpp} with <pp> 1: virtual stages need a pipeline; give <pp> 2 or more, or <vpp> 1"
            )
        if self.pp_layers is not None and (len(self.pp_layers) != self.pp * self.vpp or min(self.pp_layers) < 1):
            raise DegreesError(
                f"<pp_layers> {_shown(self.pp_layers)}: expected {self.pp * self.vpp} numbers of at least 1 "
                f"(pp {self.pp} x vpp {self.vpp}), got {len(self.pp_layers)}"
            )

    def as_json(self) -> dict[str, Any]:
        """Give the degrees as the manifest records them."""
        out: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        if self.pp_layers is not None:
            out["pp_layers"] = list(self.pp_layers)
        return out

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Degrees:
        """Read the degrees back from the form that `as_json` gives.

        Raises:
            LayoutError: a degree is missing or not a number of at least 1.
        """
        layers = value.get("pp_layers")
        numbers = {name: value.get(name) for name in _NAMES}
        listed = layers if isinstance(layers, list) else []
        known = value.keys() <= {*_NAMES, "pp_layers"} and (layers is None or listed)
        if not known or not all(type(n) is int and n >= 1 for n in (*numbers.values(), *listed)):
            raise LayoutError(
                f"degrees {str(value)[:200]} can't be read; expected whole numbers for {', '.join(_NAMES)}"
            )
        return cls(**numbers, pp_layers=tuple(listed) if listed else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"tp{self.tp} pp{self.pp} ep{self.ep} etp{self.etp}"
        return text.replace(" ep", f" vpp{self.vpp} ep", 1) if self.vpp > 1 else text


def chunk_layers(num_layers: int, degrees: Degrees) -> list[range]:
    """Split the layers into `pp * vpp` chunks of consecutive layers, in the order of the model.

    Args:
        num_layers: layers of the model.
        degrees: the layout's degrees; `pp_layers` overrules the even split.

    Returns:
        One range of global layer numbers a chunk; chunk `v * pp + p` belongs to stage p.

    Raises:
        LayoutError: the layers don't divide and `pp_layers` is not given, or it doesn't add up.
    """
    chunks = degrees.pp * degrees.vpp
    counts = degrees.pp_layers
    if chunks > num_layers:  # before anything is made for each of them
        raise DegreesError(
            f"<pp> {degrees.pp} and <vpp> {degrees.vpp}: {num_layers} layers don't divide over pp {degrees.pp} x vpp "
            f"{degrees.vpp}: at most {num_layers} stages fit"
        )
    if counts is None:
        if num_layers % chunks:
            low, more = divmod(num_layers, chunks)
            example = ",".join(str(low + (i < more)) for i in range(chunks))
            raise DegreesError(
                f"{num_layers} layers don't divide over pp {degrees.pp} x vpp {degrees.vpp}: say how with <pp_layers>, "
                f"for example {example}"
            )
        counts = (num_layers // chunks,) * chunks
    elif sum(counts) != num_layers:
        raise DegreesError(f"<pp_layers> {_shown(counts)} adds up to {sum(counts)}; the model has {num_layers} layers")
    return [range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]


def stage_of_layers(num_layers: int, degrees: Degrees) -> list[int]:
    """Give the pipeline stage (0 to pp - 1) of each layer.

    Raises:
        LayoutError: as `chunk_layers`.
    """
    stages = [0] * num_layers
    for chunk, layers in enumerate(chunk_layers(num_layers, degrees)):
        for layer in layers:
            stages[layer] = chunk % degrees.pp
    return stages


def _shown(counts: Sequence[int]) -> str:
    """Write numbers of layers as the option takes them, not all of thousands."""
    return ",".join(map(str, counts[:64])) + (",..." if len(counts) > 64 else "")

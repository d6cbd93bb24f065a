"""Names and shapes with gaps in them: `{layer}` and `{expert}` in a name, sizes in a formula."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

LAYER, EXPERT = "{layer}", "{expert}"


def fill(template: str, layer: int | None, expert: int | None) -> str:
    """Put layer and expert numbers into a name."""
    return template.replace(LAYER, str(layer)).replace(EXPERT, str(expert))


def evaluate(term: str, sizes: Mapping[str, int]) -> int:
    """Give the value of a sum of products of sizes and numbers, such as `heads*nope_dim+heads*rope_dim`."""
    return sum(
        prod(int(factor) if factor.isdigit() else sizes[factor] for factor in product.split("*"))
        for product in term.split("+")
    )


def layer_of(name: str) -> int | None:
    """Give the number of the layer that a tensor's name speaks of, whatever its family; None where it speaks of none."""
    found = re.search(r"(?:^|\.)layers\.(0|[1-9]\d{0,8})\.", name)
    return int(found[1]) if found is not None else None


def match(template: str, name: str) -> tuple[int | None, int | None] | None:
    """Find the layer and expert numbers of a name.

    Args:
        template: a name with `{layer}` and `{expert}`.
        name: a tensor's name.

    Returns:
        `(layer, expert)`, with None for what the template lacks; None where the name is of another kind.
    """
    pattern = (
        re.escape(template)
        .replace(re.escape(LAYER), r"(?P<layer>0|[1-9]\d*)")
        .replace(re.escape(EXPERT), r"(?P<expert>0|[1-9]\d*)")
    )
    found = re.fullmatch(pattern, name)
    if found is None:
        return None
    numbers = found.groupdict()
    return tuple(int(numbers[key]) if key in numbers else None for key in ("layer", "expert"))  # type: ignore[return-value]

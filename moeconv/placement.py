"""Where a layout puts each tensor: the rectangle that each rank holds, and the file that stores it once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeconv.errors import LayoutError
from moeconv.families.base import CARRIED, GlobalTensor, Model, TensorRule
from moeconv.families.quantised import BlockSplitError, Part
from moeconv.layout.degrees import Degrees, DegreesError, chunk_layers, stage_of_layers
from moeconv.layout.rect import Rect
from moeconv.layout.shard import divisors, split_ceil, split_even, split_units

_OPTIMIZER = re.compile(r"optimizer\.([a-z][a-z0-9_]*)\.(.+)")


@dataclass(frozen=True, slots=True)
class Stored:
    """A rectangle on disk: the file that stores it, and the first rank along its axis that holds it."""

    file: str
    rect: Rect


def split_optimizer_name(name: str) -> tuple[str | None, str]:
    """Tell an optimizer's tensor from a model's: `optimizer.exp_avg.X` is the state `exp_avg` of the model's tensor `X`.

    Returns:
        `(state, model tensor's name)`; the state is None for a model's tensor.
    """
    found = _OPTIMIZER.fullmatch(name)
    return (found[1], found[2]) if found is not None else (None, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A degree that doesn't divide what it splits."""

    axis: str
    """tp, pp, ep or etp."""
    degree: int
    what: str
    """What is split, its size included."""
    size: int
    fits: tuple[int, ...]
    """Degrees that divide it."""
    note: str = ""
    """What else helps, with options as `<tp>`."""

    def error(self) -> DegreesError:
        """Give it as an error."""
        fits = ", ".join(map(str, self.fits[:12]))
        text = f"{self.what} can't be shared by {self.degree} ranks; degrees that fit: {fits}"
        return DegreesError(f"<{self.axis}> {self.degree}: {text}{self.note}")


def misfits(model: Model, degrees: Degrees) -> Iterator[Misfit]:
    """List what of a model can't be split by these degrees; whether the layers divide, `chunk_layers` knows.

    Args:
        model: the model.
        degrees: the layout's degrees.

    Yields:
        Each degree that doesn't fit, with what would.
    """
    sizes, tp = model.sizes, degrees.tp
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        fits = tuple(d for d in divisors(heads) if kv_heads % d == 0 or d % kv_heads == 0)
        what = f"{heads} attention heads and {kv_heads} key/value heads"
        yield Misfit(axis="tp", degree=tp, what=what, size=heads, fits=fits)
    experts = sizes.get("experts", 0)
    if experts == 0 and degrees.ep > 1:
        what = f"a {model.family.name} model has no experts, which"
        yield Misfit(axis="ep", degree=degrees.ep, what=what, size=0, fits=(1,))
    if experts % degrees.ep:
        fits = tuple(divisors(experts))
        yield Misfit(axis="ep", degree=degrees.ep, what=f"{experts} experts", size=experts, fits=fits)
    if experts and sizes["ffn"] % degrees.etp:
        width, note = sizes["ffn"], " (<etp> defaults to <tp>)"
        what, fits = f"an expert's width of {width}", tuple(divisors(width))
        yield Misfit(axis="etp", degree=degrees.etp, what=what, size=width, fits=fits, note=note)
    for rule in model.rules:
        if (
            rule.split is None
            or rule.split.axis != "tp"
            or rule.split.rounded
            or rule.split.units in ("heads", "kv_heads")
        ):
            continue
        units = rule.split.units
        count = model.shape(rule)[rule.split.dim] if units is None else sizes[units]
        if count % tp and (units is None or tp % count):
            what = f"the {count} {'elements' if units is None else 'heads'} of {rule.name}"
            yield Misfit(axis="tp", degree=tp, what=what, size=count, fits=tuple(divisors(count)))
    if not (heads % tp or experts % degrees.ep or (experts and sizes["ffn"] % degrees.etp)):
        yield from _cut_blocks(model, degrees)


def check_degrees(model: Model, degrees: Degrees) -> None:
    """Check that a model can be split by these degrees.

    Args:
        model: the model.
        degrees: the layout's degrees.

    Raises:
        DegreesError: a degree doesn't divide what it splits, or the layers don't divide; names the option, its value
            and what fits.
    """
    for misfit in misfits(model, degrees):
        raise misfit.error()
    chunk_layers(model.sizes["layers"], degrees)


def _cut_blocks(model: Model, degrees: Degrees) -> Iterator[Misfit]:
    """List where a rank's part of a quantised weight would end inside a block; weights of a rule are cut alike, so each rule is worked out once."""
    seen = set()
    for name in sorted(model.quantised):
        weight = model.plain[name]
        split = weight.rule.split
        if split is None or weight.rule in seen:
            continue
        seen.add(weight.rule)
        problem = _block_problem(model, weight, degrees)
        if problem is not None and model.scheme is not None:
            size = weight.units or weight.shape[split.dim]
            others = ((d, replace(degrees, tp=d, etp=d, pp=1, vpp=1, pp_layers=None)) for d in divisors(size))
            fits = tuple(d for d, other in others if _block_problem(model, weight, other) is None)
            note = " (<etp> defaults to <tp>)" if split.axis == "etp" else ""
            note += ". Or import the model as plain numbers with --dtype bfloat16"
            what = f"{name}, stored as {model.scheme.name}, of which {problem},"
            degree = getattr(degrees, split.axis)
            yield Misfit(axis=split.axis, degree=degree, what=what, size=size, fits=fits, note=note)


def _block_problem(model: Model, weight: GlobalTensor, degrees: Degrees) -> str | None:
    try:
        for part in model.parts(weight):
            rank_rects(part, degrees)
    except BlockSplitError as error:
        return str(error)
    return None


def rank_rects(tensor: GlobalTensor, degrees: Degrees) -> list[Rect]:
    """Give the rectangle that each rank along the tensor's own axis holds.

    Args:
        tensor: the tensor.
        degrees: the layout's degrees.

    Returns:
        One rectangle a rank of `tp` or `etp`; a single one for a tensor that every rank holds whole. Equal rectangles are shared,
        empty ones (the vocabulary's last ranks) hold nothing.

    Raises:
        LayoutError: the dimension doesn't divide.
        BlockSplitError: a part of a quantised weight would be cut inside a block.
    """
    if tensor.part is not None and tensor.base is not None:
        return _part_rects(tensor, tensor.part, tensor.base, degrees)
    split = tensor.rule.split
    if split is None:
        return [Rect.whole(tensor.shape)]
    parts, size = getattr(degrees, split.axis), tensor.shape[split.dim]
    if split.rounded:
        ranges = split_ceil(size, parts)
    elif tensor.units is not None:
        ranges = split_units(size, tensor.units, parts)
    else:
        ranges = split_even(size, parts)
    return [Rect.slab(tensor.shape, split.dim, begin, end) for begin, end in ranges]


def _part_rects(tensor: GlobalTensor, part: Part, weight: GlobalTensor, degrees: Degrees) -> list[Rect]:
    """Cut a part of a quantised weight as the weight is cut."""
    rects = []
    for rect in rank_rects(weight, degrees):
        cut = part.cut(weight.shape, rect.offsets, rect.shape, transposed=weight.rule.transposed)
        rects.append(Rect(*cut))
    return rects[:1] if all(rect == rects[0] for rect in rects) else rects


class Placement:
    """A model under a layout: where each tensor is stored, and what each rank holds."""

    def __init__(self, model: Model, degrees: Degrees) -> None:
        """Check the degrees and lay out the stages.

        Raises:
            LayoutError: as `check_degrees`.
        """
        check_degrees(model, degrees)
        self.model, self.degrees = model, degrees
        self._stages = stage_of_layers(model.sizes["layers"], degrees)
        self._distinct: dict[TensorRule, list[tuple[int, Rect]]] = {}

    def stage(self, tensor: GlobalTensor) -> int:
        """Give the pipeline stage that stores a tensor."""
        if tensor.layer is not None:
            return self._stages[tensor.layer]
        return 0 if tensor.rule.where == "first" else self.degrees.pp - 1

    def stored(self, name: str) -> list[Stored]:
        """Give the files that store a tensor, each byte once.

        Args:
            name: a model's tensor by its hub name, or an optimizer's (`optimizer.exp_avg.<name>`).

        Returns:
            The rectangles, each with the file of the first rank that holds it; they cover the tensor exactly once.
        """
        state, base = split_optimizer_name(name)
        tensor = self.model.tensors[base]
        if not tensor.size:  # a shared expert of width 0
            return [Stored(self.file(tensor, 0), Rect.whole(tensor.shape))]
        prefix = "optimizer-" if state else ""
        return [Stored(prefix + self.file(tensor, rank), rect) for rank, rect in self._first_ranks(tensor)]

    def _first_ranks(self, tensor: GlobalTensor) -> list[tuple[int, Rect]]:
        """Give each rectangle of a tensor with the first rank that holds it; tensors of a rule are alike, so each rule is worked out once."""
        found = self._distinct.get(tensor.rule)
        if found is None:
            first: dict[Rect, int] = {}
            for rank, rect in enumerate(rank_rects(tensor, self.degrees)):
                if rect.size:
                    first.setdefault(rect, rank)
            found = self._distinct[tensor.rule] = [(rank, rect) for rect, rank in first.items()]
        return found

    def file(self, tensor: GlobalTensor, rank: int) -> str:
        """Name the file for rank `rank` along the tensor's own axis."""
        stage = self.stage(tensor)
        if tensor.rule.role == CARRIED:
            return f"{CARRIED}-pp{stage}.safetensors"
        if tensor.expert is None:
            return f"dense-tp{rank}-pp{stage}.safetensors"
        return f"experts-ep{self.expert_rank(tensor)}-etp{rank}-pp{stage}.safetensors"

    def expert_rank(self, tensor: GlobalTensor) -> int:
        """Give the expert-parallel rank whose contiguous block holds an expert's tensor."""
        assert tensor.expert is not None
        return tensor.expert // (self.model.sizes["experts"] // self.degrees.ep)

    def held(
        self, *, tp: int = 0, pp: int = 0, ep: int = 0, etp: int | None = None
    ) -> Iterator[tuple[GlobalTensor, Rect]]:
        """List what one rank holds, shared tensors included.

        Args:
            tp: tensor parallel coordinate.
            pp: pipeline stage.
            ep: expert parallel coordinate.
            etp: expert tensor parallel coordinate; by default that of `tp`, modulo the degree.

        Yields:
            Each tensor with the rank's rectangle of it, empty rectangles left out.

        Raises:
            LayoutError: a coordinate is outside its degree.
        """
        etp = tp % self.degrees.etp if etp is None else etp
        for axis, value in (("tp", tp), ("pp", pp), ("ep", ep), ("etp", etp)):
            if not 0 <= value < getattr(self.degrees, axis):
                raise LayoutError(
                    f"rank {axis}={value}: the layout has {axis} {getattr(self.degrees, axis)}; coordinates go from 0"
                )
        tied_head = self.model.flags.get("tied", False) and pp == self.degrees.pp - 1
        for tensor in self.model.tensors.values():
            here = self.stage(tensor) == pp or (tied_head and tensor.rule.role == "embedding")
            if not here or (tensor.expert is not None and self.expert_rank(tensor) != ep):
                continue
            if tensor.rule.role == CARRIED and (tp or ep or etp):  # for the stage's first rank
                continue
            rects = rank_rects(tensor, self.degrees)
            rect = rects[0] if len(rects) == 1 else rects[etp if tensor.expert is not None else tp]
            if rect.size:
                yield tensor, rect

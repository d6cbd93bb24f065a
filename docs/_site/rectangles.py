"""Draws docs/images/rectangles.svg from `moeconv.placement`: `python docs/_site/rectangles.py` writes it, a test holds it true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from moeconv.checkpoint import model_of
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.placement import Placement, Stored

OUT = Path(__file__).parents[1] / "images" / "rectangles.svg"
CONFIG = {
    "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 100,
}  # fmt: skip
LAYER = "model.layers.0."
TENSORS = (
    ("self_attn.q_proj.weight", "query heads"),
    ("self_attn.k_proj.weight", "2 key heads: fewer than ranks"),
    ("self_attn.o_proj.weight", "cut by columns"),
    ("block_sparse_moe.experts.3.w1.weight", "an expert"),
    ("input_layernorm.weight", "the same on all ranks: stored once"),
)
FROM, TO = Degrees(tp=4, ep=2), Degrees(tp=2, ep=4, etp=1)
COLOURS = ("#4063d8", "#389826", "#cb3c33", "#9558b2")
WIDTH, LEFT, RIGHT, BOX, TOP, ROW = 740, 282, 590, 96, 96, 104


def draw() -> str:
    """Give the picture: each tensor under both layouts, and an arrow for each rectangle that goes from one file to another."""
    model = model_of(CONFIG, "config.json")
    one, two = Placement(model, FROM), Placement(model, TO)
    height = TOP + ROW * len(TENSORS) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" role="img">',
        "<title>The same tensors under two layouts, and the rectangles that move between their files</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#fff"/>',
        _text(LEFT + BOX / 2, 34, f"tp {FROM.tp}, ep {FROM.ep}", 17, "middle", "600"),
        _text(RIGHT + BOX / 2, 34, f"tp {TO.tp}, ep {TO.ep}, etp {TO.etp}", 17, "middle", "600"),
        _text((LEFT + RIGHT + BOX) / 2, 34, "moeconv reshard", 14, "middle", mono=True),
        _text(24, 66, "each rectangle names the file that holds it; each byte is in one file only", 13, colour="#556"),
    ]
    for number, (tensor, note) in enumerate(TENSORS):
        name, y = LAYER + tensor, TOP + ROW * number
        shape = model.tensors[name].shape
        lines += [_text(24, y + 26, tensor.split(".weight")[0].split("moe.")[-1], 14, weight="600", mono=True)]
        lines += [
            _text(24, y + 47, " x ".join(map(str, shape)), 13, colour="#556"),
            _text(24, y + 66, note, 13, colour="#556"),
        ]
        before, after = one.stored(name), two.stored(name)
        for column, stored in ((LEFT, before), (RIGHT, after)):
            lines += _boxes(column, y, shape, stored)
        lines += _arrows(y, shape, before, after)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _boxes(x: float, y: float, shape: tuple[int, ...], stored: list[Stored]) -> Iterator[str]:
    for item in stored:
        left, top, width, height = _place(x, y, shape, item.rect)
        label = item.file.removesuffix(".safetensors").replace("-pp0", "").replace("dense-", "").replace("experts-", "")
        place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
        yield f'<rect {place} fill="{_colour(item)}" stroke="#fff" stroke-width="2"/>'
        if width < height:  # a column: its label stands upright
            at = f"{left + width / 2 + 4:g} {top + height / 2:g}"
            yield _text(
                left + width / 2 + 4, top + height / 2, label, 11, "middle", colour="#fff", turn=f"rotate(-90 {at})"
            )
        else:
            yield _text(left + width / 2, top + height / 2 + 4, label, 11, "middle", colour="#fff")


def _arrows(y: float, shape: tuple[int, ...], before: list[Stored], after: list[Stored]) -> Iterator[str]:
    for source in before:
        for target in after:
            part = source.rect.intersect(target.rect)
            if part is None:
                continue
            if (
                len(shape) > 1 and part.shape[0] == shape[0] and part.shape[1] != shape[1]
            ):  # columns: arrows above each other
                at = y + 80 * (part.offsets[1] + part.shape[1] / 2) / shape[1]
            else:
                _, top, _, height = _place(0, y, shape, part)
                at = top + height / 2
            yield (
                f'<path d="M{LEFT + BOX + 8},{at:g} L{RIGHT - 8},{at:g}" stroke="{_colour(source)}" '
                'stroke-width="2" fill="none" marker-end="url(#head)"/>'
            )


def _place(x: float, y: float, shape: tuple[int, ...], rect: Rect) -> tuple[float, float, float, float]:
    """Give the place of a rectangle of a tensor that is drawn as 96 x 80; a vector is drawn as a band of 18."""
    if len(shape) == 1:
        return x, y + 31, BOX, 18.0
    (rows, columns), (top, left), (height, width) = shape, rect.offsets, rect.shape
    return x + BOX * left / columns, y + 80 * top / rows, BOX * width / columns, 80 * height / rows


def _colour(stored: Stored) -> str:
    """Give a file's colour: that of its rank along the axis that cuts the tensor."""
    return COLOURS[int(re.findall(r"tp([0-9]+)", stored.file)[-1]) % len(COLOURS)]


def _text(
    x: float, y: float, words: str, size: int, anchor: str = "start", weight: str = "400", *, colour: str = "#223",
    mono: bool = False, turn: str = "",
) -> str:  # fmt: skip
    family = ' font-family="ui-monospace, monospace"' if mono else ""
    turned = f' transform="{turn}"' if turn else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
        f"{family}{turned}>{words}</text>"
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf8")

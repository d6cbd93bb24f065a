"""The commands `inspect`, `verify` and `diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cli.main import ExitCode
from cli.options import amount, progress_bar, show
from moeconv.api import looking as api
from moeconv.convert import Options
from moeconv.errors import LayoutError


@click.command()
@click.argument("path")
@click.option("--rank", metavar="tp=0,ep=1,...", help="List the rectangles that this rank holds.")
@click.option("--tensor", "pattern", default=None, metavar="GLOB", help="Only tensors whose name matches.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def inspect(path: str, rank: str | None, pattern: str | None, as_json: bool) -> None:
    """Show the model in PATH (a folder, or a hub repository's id), its layout and what each rank holds.

    Example: moeconv inspect ckpt --rank tp=0,ep=1 --tensor '*experts*'
    """
    value = api.inspect(path, rank=None if rank is None else _coordinates(rank), pattern=pattern)
    lines = _screen(value)
    if "rank" in value:
        held = value["rank"]["tensors"]
        size = amount(sum(t["nbytes"] for t in held))
        lines += ["", f"rank {rank or 'of the first coordinates'}: {len(held)} rectangles, {size}"]
        lines += [f"  {t['name']:<62} {t['dtype']:<5} {t['rect']}" for t in held]
    show(value, as_json, lines)


@click.command()
@click.argument("path")
@click.option("--against", metavar="OTHER", help="Compare byte for byte with this checkpoint, of any layout.")
@click.option(
    "--logits", is_flag=True, help="With --against: compare transformers' logits in fp32 too, layer by layer."
)
@click.option("--workers", type=click.IntRange(1), help="Threads; by default one a core, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def verify(path: str, against: str | None, logits: bool, workers: int | None, as_json: bool) -> None:
    """Check PATH: headers, exact coverage, every checksum. Exit code 1: damaged; 3: differs from OTHER.

    Example: moeconv verify ckpt --against mistralai/Mixtral-8x7B-v0.1
    """
    if logits and against is None:
        raise click.UsageError("--logits compares two checkpoints; give --against OTHER")
    with progress_bar("verify") as progress:
        options = Options(workers=workers, progress=progress)
        found = api.verify(path, against=against, logits=logits, options=options)
    value = {
        "path": path,
        "bytes": found.nbytes,
        "checked": found.checked,
        "same": found.same,
        "difference": found.difference and asdict(found.difference),
        "logits_difference": found.logits_difference,
    }
    lines = [f"{path}: {found.tensors} tensors, {amount(found.nbytes)}: {found.checked} are right"]
    if against is not None:
        first = found.difference
        lines.append(
            f"{against}: holds the same bytes" if first is None else f"{against}: differs: {first.name}: {first.what}"
        )
        lines += _state_note(found.alone)
    if found.logits_difference is not None:
        lines.append(f"{against}: logits differ by {found.logits_difference:.2e} of the largest")
    show(value, as_json, lines)
    if not found.passed:
        raise SystemExit(ExitCode.DIFFERENT)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def diff(a: str, b: str, as_json: bool) -> None:
    """Show what differs between A and B: tensors, dtypes, shapes, config fields, and how far values are apart. Exit code 3: they differ.

    Example: moeconv diff ckpt ckpt-trained
    """
    with progress_bar("compare") as progress:
        found = api.diff(a, b, options=Options(progress=progress))
    measured = {gap.name: gap for gap in found.measured}
    value = {
        "config": [asdict(d) for d in found.config],
        "tensors": [asdict(d) | (asdict(measured[d.name]) if d.name in measured else {}) for d in found.tensors],
    }
    lines = [f"config {d.name}: {d.what}" for d in found.config]
    for d in found.tensors:
        gap = measured.get(d.name)
        lines.append(
            f"{d.name}: {d.what}"
            if gap is None
            else f"{d.name}: max {gap.max_abs:.3e}, mean {gap.mean_abs:.3e}, {gap.count} elements"
        )
    lines += _state_note(found.alone)
    counts = f"{len(found.tensors)} tensors and {len(found.config)} config fields differ"
    lines.append("no difference" if found.same else counts)
    show(value, as_json, lines)
    if not found.same:
        raise SystemExit(ExitCode.DIFFERENT)


def _state_note(alone: str | None) -> list[str]:
    return [f"optimizer state: only {alone} has it; not compared"] if alone is not None else []


def _coordinates(text: str) -> dict[str, int]:
    try:
        return {axis.strip(): int(value) for axis, value in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        raise LayoutError(f"--rank {text}: expected coordinates such as tp=0,ep=1") from None


def _screen(value: dict[str, Any]) -> list[str]:
    sizes = value["sizes"]
    optimizer = ", with optimizer state" if value["optimizer_state"] else ""
    adapter = value.get("adapter")
    quantised, unread = value["quantised"], value["unread_config_keys"]
    lines = [
        f"{value['path']}: {value['family']}, {value['kind']}, {', '.join(value['dtypes'])}",
        f"  parameters  {value['parameters']:,} total, {value['active_parameters']:,} active for a token",
        f"  sizes       {', '.join(f'{name} {size}' for name, size in sizes.items())}{', tied embeddings' if value['tied_embeddings'] else ''}",
        f"  stored      {value['tensors']} tensors, {amount(value['bytes'])} in {value['files']} files{optimizer}",
        *([f"  quantised   {quantised['weights']} weights as {quantised['as']}"] if quantised else []),
        *([f"  carried     {value['carried_tensors']} tensors, unread"] if value["carried_tensors"] else []),
        *(
            [f"  unread keys {', '.join(unread)} of config.json: transformers reads none of them either"]
            if unread
            else []
        ),
    ]
    if adapter is not None:
        kind = f"rank {adapter['rank']}, alpha {adapter['alpha']:g}{', rank-stabilised' if adapter['rslora'] else ''}"
        lines.append(f"  adapters    {kind}, of {adapter['base_path']} (fingerprint {adapter['base']})")
    if "degrees" in value:
        lines.append("  layout      " + ", ".join(f"{name} {degree}" for name, degree in value["degrees"].items()))
        lines += [f"  stage {stage:<6}layers {_ranges(layers)}" for stage, layers in enumerate(value["stages"])]
        lines += [
            f"  rank        pp={r['pp']} tp={r['tp']} ep={r['ep']}: {amount(r['bytes'])}" for r in value["rank_bytes"]
        ]
    return lines


def _ranges(layers: list[int]) -> str:
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][1] + 1:
            groups[-1][1] = layer
        else:
            groups.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in groups)

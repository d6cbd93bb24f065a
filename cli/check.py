"""The commands `inspect`, `verify` and `diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cli.main import ExitCode
from cli.options import amount, progress_bar, show
from moeconv.checkpoint import Checkpoint
from moeconv.describe import describe, rank_tensors
from moeconv.errors import LayoutError
from moeconv.formats import open_any
from moeconv.hub import local_folder
from moeconv.hub_preview import preview
from moeconv.megatron.checkpoint import MegatronCheckpoint

_LOGITS_TOLERANCE = 1e-5


@click.command()
@click.argument("path")
@click.option("--rank", metavar="tp=0,ep=1,...", help="List the rectangles that this rank holds.")
@click.option("--tensor", "pattern", default=None, metavar="GLOB", help="Only tensors whose name matches.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def inspect(path: str, rank: str | None, pattern: str | None, as_json: bool) -> None:
    """Show the model in PATH (a folder, or a hub repository's id), its layout and what each rank holds.

    Example: moeconv inspect ckpt --rank tp=0,ep=1 --tensor '*experts*'
    """
    with preview(path) as seen:
        checkpoint = open_any(seen.folder)
    value = describe(checkpoint) | {"path": path}
    lines = _screen(value)
    if rank is not None or pattern is not None:
        held = rank_tensors(checkpoint, _coordinates(rank or ""), pattern or "*")
        value["rank"] = {"coordinates": _coordinates(rank or ""), "tensors": [asdict(t) for t in held]}
        lines += [
            "",
            f"rank {rank or 'of the first coordinates'}: {len(held)} rectangles, {amount(sum(t.nbytes for t in held))}",
        ]
        lines += [f"  {t.name:<62} {t.dtype:<5} {t.rect}" for t in held]
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
    from moeconv.checking import compare, lone_state
    from moeconv.checking import verify as check

    if logits and against is None:
        raise click.UsageError("--logits compares two checkpoints; give --against OTHER")
    checkpoint = open_any(local_folder(path))
    with progress_bar("verify") as progress:
        nbytes = check(
            checkpoint, workers=workers, progress=progress(sum(i.nbytes for i in checkpoint.tensors.values()))
        )
    megatron = isinstance(checkpoint, MegatronCheckpoint)
    if isinstance(checkpoint, MegatronCheckpoint):
        checkpoint.check()
    checked = (
        "checksums and coverage"
        if checkpoint.kind == "sharded"
        else "archives' checksums, replicas and coverage"
        if megatron
        else "headers and coverage (a Hugging Face folder has no checksums)"
    )
    value: dict[str, Any] = {
        "path": path,
        "bytes": nbytes,
        "checked": checked,
        "same": None,
        "difference": None,
        "logits_difference": None,
    }
    lines = [f"{path}: {len(checkpoint.tensors)} tensors, {amount(nbytes)}: {checked} are right"]
    different = False
    if against is not None:
        other = open_any(local_folder(against))
        with progress_bar("compare") as progress:
            found = next(compare(checkpoint, other, progress(nbytes)), None)
        value["same"], value["difference"] = found is None, found and asdict(found)
        lines.append(
            f"{against}: holds the same bytes" if found is None else f"{against}: differs: {found.name}: {found.what}"
        )
        lines += _state_note(lone_state(checkpoint, other))
        different = found is not None
        if logits:
            from moeconv.forward import logits_difference

            gap = value["logits_difference"] = logits_difference(checkpoint, other)
            lines.append(f"{against}: logits differ by {gap:.2e} of the largest")
            different = different or not gap <= _LOGITS_TOLERANCE
    show(value, as_json, lines)
    if different:
        raise SystemExit(ExitCode.DIFFERENT)


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def diff(a: str, b: str, as_json: bool) -> None:
    """Show what differs between A and B: tensors, dtypes, shapes, config fields, and how far values are apart. Exit code 3: they differ.

    Example: moeconv diff ckpt ckpt-trained
    """
    from moeconv.checking import compare, config_differences, lone_state, measure

    left, right = open_any(local_folder(a)), open_any(local_folder(b))
    config = config_differences(left.config, right.config)
    with progress_bar("compare") as progress:
        found = list(compare(left, right, progress(sum(i.nbytes for i in left.tensors.values()))))
    both = [d.name for d in found if left.tensors.get(d.name) == right.tensors.get(d.name)]
    measured = {name: measure(left, right, name) for name in both}
    value = {
        "config": [asdict(d) for d in config],
        "tensors": [asdict(d) | (asdict(measured[d.name]) if d.name in measured else {}) for d in found],
    }
    lines = [f"config {d.name}: {d.what}" for d in config]
    for d in found:
        gap = measured.get(d.name)
        lines.append(
            f"{d.name}: {d.what}"
            if gap is None
            else f"{d.name}: max {gap.max_abs:.3e}, mean {gap.mean_abs:.3e}, {gap.count} elements"
        )
    lines += _state_note(lone_state(left, right))
    lines.append(f"{len(found)} tensors and {len(config)} config fields differ" if found or config else "no difference")
    show(value, as_json, lines)
    if found or config:
        raise SystemExit(ExitCode.DIFFERENT)


def _state_note(alone: Checkpoint | None) -> list[str]:
    return [f"optimizer state: only {alone.root} has it; not compared"] if alone is not None else []


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

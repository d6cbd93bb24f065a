"""The commands `import-hf`, `reshard` and `export-hf`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cli.options import ByteSize, amount, conversion, degree_options, degrees, few, progress_bar, run_options, show
from moeconv.checkpoint import TRAINER, Checkpoint, open_checkpoint
from moeconv.convert import plan_hf, plan_sharded, write_hf, write_sharded
from moeconv.errors import SourceError, WriteError
from moeconv.hub import push_folder
from moeconv.hub_preview import opened, preview
from moeconv.io.carried import size_of
from moeconv.io.staging import check_free
from moeconv.layout.degrees import Degrees
from moeconv.plan import Plan
from moeconv.quant import FP8, PLAIN


@click.command("import-hf")
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@degree_options
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option(
    "--carry",
    metavar="GLOB",
    multiple=True,
    help="Have tensors of these names, which the family doesn't know, go along unread; may be given several times.",
)
@click.option("--strip-prefix", metavar="TEXT", default="", help="Take this off the front of every tensor's name.")
@click.option(
    "--dtype",
    type=click.Choice([*PLAIN, FP8]),
    help="Cast weights on the way: quantised ones (MXFP4, FP8) to plain numbers, plain ones to fp8 blocks.",
)
@run_options
def import_hf(src: str, out: Path, **options: Any) -> None:
    """Turn the Hugging Face checkpoint SRC (a folder, or a hub repository's id) into the sharded checkpoint OUT.

    Example: moeconv import-hf mistralai/Mixtral-8x7B-v0.1 ckpt --tp 4 --ep 4
    """
    check_free(out.absolute())
    layout = degrees(options)
    if options["dry_run"]:
        with preview(src, options["revision"]) as seen:
            _sharded(_open(seen.folder, options), out, layout, options, "import")
        return
    source = opened(src, options["revision"], lambda f: _open(f, options), lambda found: plan_sharded(found, layout))
    _sharded(source, out, layout, options, "import")


def _open(folder: Path, options: dict[str, Any]) -> Checkpoint:
    source = open_checkpoint(folder, options["carry"], options["strip_prefix"])
    if source.kind == "sharded":
        raise SourceError(f"{folder}: is sharded already; change its layout with `moeconv reshard`")
    if options["dtype"] is None:
        return source
    from moeconv.quant.cast import cast

    return cast(source, options["dtype"])


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@degree_options
@run_options
def reshard(ckpt: Path, out: Path, **options: Any) -> None:
    """Turn the sharded checkpoint CKPT into OUT, of another layout; optimizer state goes along.

    Example: moeconv reshard ckpt ckpt-ep8 --ep 8 --etp 1
    """
    source = open_checkpoint(ckpt, adapters=True)
    if source.kind != "sharded":
        raise SourceError(f"{ckpt}: is a Hugging Face folder; shard it with `moeconv import-hf`")
    _sharded(source, out, degrees(options), options, "reshard")


@click.command("export-hf")
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--max-shard-size", type=ByteSize(), help="Cut files anew, such as 5GB; by default the source's own files."
)
@click.option(
    "--names",
    type=click.Choice(["hub", "fused"]),
    help="Cut files anew under these names: those of published checkpoints, or with experts fused as transformers 5 keeps them.",
)
@click.option(
    "--weights",
    type=click.Choice(["trained", "ema"]),
    default="trained",
    show_default=True,
    help="What a run has trained, or with ema the exponential mean of it that --ema-decay keeps.",
)
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this hub repository.")
@click.option("--private", is_flag=True, help="Create the hub repository as a private one.")
@run_options
def export_hf(ckpt: Path, out: Path, **options: Any) -> None:
    """Turn the sharded checkpoint CKPT into the Hugging Face folder OUT: byte for byte what was imported, unless it was trained.

    Example: moeconv export-hf ckpt mixtral-trained --max-shard-size 5GB
    """
    source = open_checkpoint(ckpt)
    if source.kind != "sharded":
        raise SourceError(f"{ckpt}: is a Hugging Face folder already")
    if options["weights"] == "ema":
        from moeconv.quant.mean import with_mean

        source = with_mean(source)
    limit = options["max_shard_size"]
    if options["private"] and not options["push_to_hub"]:
        raise WriteError("--private: says how --push-to-hub creates a repository; give --push-to-hub REPO too")
    if options["dry_run"]:
        check_free(out.absolute())
        _report("export", plan_hf(source, limit, options["names"])[0], source, out, 0.0, options)
        return
    begin = time.perf_counter()
    with progress_bar("export") as progress:
        plan = write_hf(source, out, limit, conversion(options, progress), options["names"])
    seconds = time.perf_counter() - begin
    pushed = push_folder(out, options["push_to_hub"], private=options["private"]) if options["push_to_hub"] else None
    _report("export", plan, source, out, seconds, options, pushed)


def _sharded(source: Checkpoint, out: Path, layout: Degrees, options: dict[str, Any], title: str) -> None:
    if options["dry_run"]:
        check_free(out.absolute())
        _report(title, plan_sharded(source, layout), source, out, 0.0, options)
        return
    begin = time.perf_counter()
    with progress_bar(title) as progress:
        plan = write_sharded(source, out, layout, conversion(options, progress))
    _report(title, plan, source, out, time.perf_counter() - begin, options)


def _report(
    title: str,
    plan: Plan,
    source: Checkpoint,
    out: Path,
    seconds: float,
    options: dict[str, Any],
    pushed: str | None = None,
) -> None:
    dry = options["dry_run"]
    cast: Sequence[str] = getattr(source, "notes", ())
    carried = {
        name: size_of(content) for name, content in source.carried_files.items() if title != "export" or name != TRAINER
    }
    value = {
        "command": title,
        "out": str(out),
        "dry_run": dry,
        "tensors": len(plan.jobs),
        "files": {file.name: file.size for file in plan.files},
        "carried": carried,
        "bytes": plan.nbytes,
        "seconds": round(seconds, 3),
        "dropped": source.dropped,
        "cast": list(cast),
        "pushed": pushed,
    }
    lines = [f"{file.name:<40} {amount(file.size):>10}" for file in plan.files] if dry else []
    lines += [f"{name:<40} {amount(size):>10}  goes along" for name, size in carried.items()] if dry else []
    lines += few([f"not converted: {what}" for what in source.dropped])
    lines += [f"cast: {what}" for what in cast]
    what = f"{len(plan.jobs)} tensors in {len(plan.files)} files, {amount(plan.nbytes)}"
    what += f", and {len(carried)} files beside them, {amount(sum(carried.values()))}" if carried else ""
    lines.append(
        f"{out}: would hold {what}"
        if dry
        else f"{out}: {what} in {seconds:.1f} s ({amount(plan.nbytes / max(seconds, 1e-9))}/s)"
    )
    show(value, options["as_json"], lines + ([f"uploaded: {pushed}"] if pushed else []))

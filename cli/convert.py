"""The commands `import-hf`, `reshard` and `export-hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import ByteSize, amount, conversion, degree_options, degrees, few, progress_bar, run_options, show
from moeconv.api import conversions as api
from moeconv.api.written import Written
from moeconv.errors import WriteError
from moeconv.hub import push_folder
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
    help="Cast weights on the way: quantised ones (MXFP4, FP8, NVFP4, packed int4) to plain numbers, plain ones to fp8 blocks.",
)
@run_options
def import_hf(src: str, out: Path, **options: Any) -> None:
    """Turn the Hugging Face checkpoint SRC (a folder, or a hub repository's id) into the sharded checkpoint OUT.

    Example: moeconv import-hf mistralai/Mixtral-8x7B-v0.1 ckpt --tp 4 --ep 4
    """
    with progress_bar("import") as progress:
        done = api.import_hf(
            src,
            out,
            degrees(options),
            revision=options["revision"],
            carry=options["carry"],
            strip_prefix=options["strip_prefix"],
            dtype=options["dtype"],
            options=conversion(options, progress),
            dry_run=options["dry_run"],
        )
    _report("import", done, options["as_json"])


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@degree_options
@run_options
def reshard(ckpt: Path, out: Path, **options: Any) -> None:
    """Turn the sharded checkpoint CKPT into OUT, of another layout; optimizer state goes along.

    Example: moeconv reshard ckpt ckpt-ep8 --ep 8 --etp 1
    """
    with progress_bar("reshard") as progress:
        run = conversion(options, progress)
        done = api.reshard(ckpt, out, degrees(options), options=run, dry_run=options["dry_run"])
    _report("reshard", done, options["as_json"])


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
    if options["private"] and not options["push_to_hub"]:
        raise WriteError("--private: says how --push-to-hub creates a repository; give --push-to-hub REPO too")
    with progress_bar("export") as progress:
        done = api.export_hf(
            ckpt,
            out,
            max_shard_size=options["max_shard_size"],
            names=options["names"],
            weights=options["weights"],
            options=conversion(options, progress),
            dry_run=options["dry_run"],
        )
    push = options["push_to_hub"] and not options["dry_run"]
    pushed = push_folder(out, options["push_to_hub"], private=options["private"]) if push else None
    _report("export", done, options["as_json"], pushed)


def _report(title: str, done: Written, as_json: bool, pushed: str | None = None) -> None:
    value = {
        "command": title,
        "out": str(done.out),
        "dry_run": done.dry_run,
        "tensors": done.tensors,
        "files": done.files,
        "carried": done.carried,
        "bytes": done.nbytes,
        "seconds": done.seconds,
        "dropped": list(done.dropped),
        "cast": list(done.notes),
        "pushed": pushed,
    }
    lines = [f"{name:<40} {amount(size):>10}" for name, size in done.files.items()] if done.dry_run else []
    lines += (
        [f"{name:<40} {amount(size):>10}  goes along" for name, size in done.carried.items()] if done.dry_run else []
    )
    lines += few([f"not converted: {what}" for what in done.dropped])
    lines += [f"cast: {what}" for what in done.notes]
    what = f"{done.tensors} tensors in {len(done.files)} files, {amount(done.nbytes)}"
    what += f", and {len(done.carried)} files beside them, {amount(sum(done.carried.values()))}" if done.carried else ""
    rate = amount(done.nbytes / max(done.seconds, 1e-9))
    lines.append(
        f"{done.out}: would hold {what}" if done.dry_run else f"{done.out}: {what} in {done.seconds:.1f} s ({rate}/s)"
    )
    show(value, as_json, lines + ([f"uploaded: {pushed}"] if pushed else []))

"""The commands `merge` and `export-adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import amount, conversion, progress_bar, run_options, show
from moeconv.api import models as api
from moeconv.api.written import Written


@click.command("merge")
@click.argument("ckpt")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--hf", is_flag=True, help="Write a sharded CKPT as a Hugging Face folder.")
@click.option(
    "--logits/--no-logits",
    default=None,
    help="Compare logits before OUT is finished; by default where a layer in fp32 fits into memory.",
)
@run_options
def merge_adapter(ckpt: str, adapter: str, out: Path, hf: bool, logits: bool | None, **options: Any) -> None:
    """Add ADAPTER (a PEFT folder, or a run that trained adapters) to the weights of CKPT (sharded, or a Hugging Face folder).

    Sums are made in fp32 and rounded once. Before OUT gets its name, every changed weight is compared with its sum, and the
    logits with those of CKPT with the adapter. An adapter of which anything would be left out is refused.

    Example: moeconv merge ckpt run/latest merged --hf
    """
    with progress_bar("merge") as progress:
        run = conversion(options, progress)
        done = api.merge(ckpt, adapter, out, hf=hf, check=logits, options=run, dry_run=options["dry_run"])
    _report(done, options["as_json"])


def _report(done: Written, as_json: bool) -> None:
    found, proof = done.details, done.details["proof"]
    value = {
        "command": "merge",
        "out": str(done.out),
        "dry_run": done.dry_run,
        "adapter": found["adapter"],
        "added_to": found["added_to"],
        "replaced": found["replaced"],
        "trained_over": found["trained_over"],
        "files": done.files,
        "bytes": done.nbytes,
        "seconds": done.seconds,
        "left_out": list(done.dropped),
        "notes": found["notes"],
        "proof": proof,
    }
    added = f"added to {found['added_to']} weights, in place of {found['replaced']}"
    lines = [f"{found['adapter']}: {found['adapter_kind']}: {added}"]
    if found["trained_over"] is not None:
        lines.append(
            f"the adapter was trained over the model in {found['trained_over']}; it is added to the weights as {found['base']} has "
            f"them, which differ from what training saw by the rounding to {found['trained_over']}"
        )
    if found["notes"]:
        lines += found["notes"]
        lines.append(
            f"to have them in FP8 again, which rounds the sums: moeconv import-hf {done.out} SHARDS --dtype fp8, then export-hf"
        )
    lines += [f"not taken along: {what}" for what in done.dropped]
    lines += [] if proof is None else _proved(proof)
    what = f"{done.tensors} tensors in {len(done.files)} files, {amount(done.nbytes)}"
    lines.append(f"{done.out}: would hold {what}" if done.dry_run else f"{done.out}: {what} in {done.seconds:.1f} s")
    show(value, as_json, lines)


def _proved(proof: dict[str, Any]) -> list[str]:
    zero = f"; {proof['zero']} adapters add nothing" if proof["zero"] else ""
    lines = [
        f"checked: {proof['weights']} weights are their sums, rounded once; rounding changed them by {proof['rounding']:.1%} of what the "
        f"adapter did{zero}"
    ]
    if proof["rounding"] > 1:
        lines.append(
            "WARNING: rounding changed the weights by more than the adapter did: little of it is left in weights of 16 bits"
        )
    if proof["logits_error"] is None:
        return [*lines, proof["note"]]
    found = f"logits differ by {proof['logits_error']:.1e} of the largest from those of the base with the adapter"
    return [*lines, f"checked: {found} (bound {proof['bound']:.0e})"]


@click.command("export-adapter")
@click.argument("save", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--form",
    type=click.Choice(["stacked", "experts"]),
    help="Routed experts' adapters: stacked, as PEFT has them with transformers 5 (the default), or each expert's by its name on the hub.",
)
@click.option(
    "--base-name", metavar="NAME", help="What the config calls the model; by default the path that was trained."
)
@run_options
def export_adapter(save: Path, out: Path, form: Any, base_name: str | None, **options: Any) -> None:
    """Turn SAVE, of a run that trained adapters, into the PEFT folder OUT.

    Example: moeconv export-adapter run/latest adapter --base-name mistralai/Mixtral-8x7B-v0.1
    """
    with progress_bar("export") as progress:
        run = conversion(options, progress)
        done = api.export_adapter(save, out, form=form, base_name=base_name, options=run, dry_run=options["dry_run"])
    value = {
        "command": "export-adapter",
        "out": str(out),
        "dry_run": done.dry_run,
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "seconds": done.seconds,
        "config": done.details["config"],
    }
    what = f"{done.tensors} tensors, {amount(done.nbytes)}"
    show(value, options["as_json"], [f"{out}: would hold {what}" if done.dry_run else f"{out}: {what}"])

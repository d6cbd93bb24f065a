"""The commands `merge` and `export-adapter`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.options import amount, conversion, progress_bar, run_options, show
from moeconv.adapters.export import plan_peft, write_peft
from moeconv.adapters.merge import Merged, Proof, merge, plan_merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.checkpoint import open_checkpoint
from moeconv.errors import SourceError
from moeconv.hub import local_folder
from moeconv.io.manifest import MANIFEST
from moeconv.io.staging import check_free
from moeconv.plan import Plan


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
    check_free(out.absolute())
    base = open_checkpoint(local_folder(ckpt))
    if hf and base.kind != "sharded":
        raise SourceError(f"{ckpt}: is a Hugging Face folder, and so will be {out}; leave --hf out")
    merged = merge(base, open_adapter(local_folder(adapter), base.model))
    if options["dry_run"]:
        _report(merged, plan_merge(merged, hf=hf)[0], None, out, 0.0, options)
        return
    begin = time.perf_counter()
    with progress_bar("merge") as progress:
        plan, proof = write_merge(merged, out, conversion(options, progress), hf=hf, logits=logits)
    _report(merged, plan, proof, out, time.perf_counter() - begin, options)


def _report(
    merged: Merged, plan: Plan, proof: Proof | None, out: Path, seconds: float, options: dict[str, Any]
) -> None:
    adapter = merged.adapter_of
    record = adapter.save.adapter if adapter.save is not None else None
    value = {
        "command": "merge",
        "out": str(out),
        "dry_run": proof is None,
        "adapter": str(adapter.root),
        "added_to": len(adapter.deltas),
        "replaced": len(adapter.whole),
        "trained_over": record.quantize_base if record is not None else None,
        "files": {file.name: file.size for file in plan.files},
        "bytes": plan.nbytes,
        "seconds": round(seconds, 3),
        "left_out": list(merged.stale),
        "proof": None if proof is None else asdict(proof),
    }
    lines = [
        f"{adapter.root}: {adapter.title}: added to {len(adapter.deltas)} weights, in place of {len(adapter.whole)}"
    ]
    if record is not None and record.quantize_base is not None:
        lines.append(
            f"the adapter was trained over the model in {record.quantize_base}; it is added to the weights as {merged.root} has them, "
            f"which differ from what training saw by the rounding to {record.quantize_base}"
        )
    lines += [f"not taken along: {what}" for what in merged.stale]
    lines += [] if proof is None else _proved(proof)
    what = f"{len(plan.jobs)} tensors in {len(plan.files)} files, {amount(plan.nbytes)}"
    lines.append(f"{out}: would hold {what}" if proof is None else f"{out}: {what} in {seconds:.1f} s")
    show(value, options["as_json"], lines)


def _proved(proof: Proof) -> list[str]:
    zero = f"; {proof.zero} adapters add nothing" if proof.zero else ""
    lines = [
        f"checked: {proof.weights} weights are their sums, rounded once; rounding changed them by {proof.rounding:.1%} of what the "
        f"adapter did{zero}"
    ]
    if proof.rounding > 1:
        lines.append(
            "WARNING: rounding changed the weights by more than the adapter did: little of it is left in weights of 16 bits"
        )
    if proof.logits_error is None:
        return [*lines, proof.note]
    found = f"logits differ by {proof.logits_error:.1e} of the largest from those of the base with the adapter"
    return [*lines, f"checked: {found} (bound {proof.bound:.0e})"]


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
    check_free(out.absolute())
    found = save / "latest" if (save / "latest" / MANIFEST).is_file() else save
    folder = plan_peft(open_checkpoint(found.resolve(), adapters=True), form, base_name)
    begin = time.perf_counter()
    if not options["dry_run"]:
        with progress_bar("export") as progress:
            write_peft(folder, out, conversion(options, progress))
    value = {
        "command": "export-adapter",
        "out": str(out),
        "dry_run": options["dry_run"],
        "tensors": len(folder.matrices),
        "bytes": folder.nbytes,
        "seconds": round(time.perf_counter() - begin, 3),
        "config": folder.config,
    }
    what = f"{len(folder.matrices)} tensors, {amount(folder.nbytes)}"
    show(value, options["as_json"], [f"{out}: would hold {what}" if options["dry_run"] else f"{out}: {what}"])

"""The commands `import-megatron` and `export-megatron`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cli.options import LayerCounts, amount, conversion, progress_bar, run_options, show
from moeconv.api import conversions as api
from moeconv.layout.degrees import Degrees


def _degree_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the degrees of the layout to be written; those of the source are the default of an import."""
    degree = click.IntRange(1)
    for option in (
        click.option(
            "--pp-layers", type=LayerCounts(), help="Layers of each stage, as 9,8,8,7, where they don't divide."
        ),
        click.option("--etp", type=degree, help="Tensor parallel degree of experts; by default that of --tp."),
        click.option("--ep", type=degree, help="Expert parallel degree."),
        click.option("--vpp", type=degree, help="Virtual pipeline stages a rank."),
        click.option("--pp", type=degree, help="Pipeline parallel degree."),
        click.option("--tp", type=degree, help="Tensor parallel degree."),
    ):
        command = option(command)
    return command


@click.command("import-megatron")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(0), help="The iteration; by default the one that the tracker names.")
@click.option(
    "--hf-config",
    type=click.Path(path_type=Path, exists=True),
    help="The model's config.json or a folder with it; by default made from the checkpoint's args.",
)
@click.option("--ignore-args", is_flag=True, help="Trust --hf-config where the checkpoint's args say otherwise.")
@click.option("--no-optimizer", is_flag=True, help="Import the weights alone.")
@_degree_options
@run_options
def import_megatron(src: Path, out: Path, **options: Any) -> None:
    """Turn a Megatron-Core checkpoint SRC into the sharded checkpoint OUT.

    SRC is the folder that Megatron's --save named, or one iteration in it; both formats (torch, torch_dist), any
    layout, any spec. Neither Megatron, Transformer Engine nor a GPU is needed, and no pickle is ever executed. OUT has
    SRC's degrees unless others are given; moeconv export-hf makes it a Hugging Face folder.

    Example: moeconv import-megatron checkpoints/run7 mixtral-shards
    """
    with progress_bar("import") as progress:
        summary = api.import_megatron(
            src,
            out,
            _degrees(options),
            iteration=options["iteration"],
            hf_config=options["hf_config"],
            ignore_args=options["ignore_args"],
            optimizer=not options["no_optimizer"],
            options=conversion(options, progress),
            dry_run=options["dry_run"],
        )
    _report(summary, out, options)


@click.command("export-megatron")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["torch", "torch_dist"]),
    required=True,
    help="torch_dist loads under any layout; torch only under the one that is written.",
)
@click.option("--spec", type=click.Choice(["te", "local"]), default="te", help="Megatron's --transformer-impl.")
@click.option(
    "--experts",
    type=click.Choice(["grouped", "sequential"]),
    help="grouped: with --moe-grouped-gemm (default of te); sequential: without (default of local).",
)
@click.option("--no-optimizer", is_flag=True, help="Export the weights alone.")
@_degree_options
@run_options
def export_megatron(src: Path, out: Path, **options: Any) -> None:
    """Turn a model SRC into a Megatron-Core checkpoint OUT, ready for Megatron's --load.

    OUT also gets the model's config and tokenizer, which Megatron leaves alone and import-megatron uses.

    Example: moeconv export-megatron mixtral-hf out --format torch_dist --tp 2 --ep 4
    """
    with progress_bar("export") as progress:
        summary = api.export_megatron(
            src,
            out,
            _degrees(options),
            format=options["fmt"],
            spec=options["spec"],
            experts=options["experts"],
            optimizer=not options["no_optimizer"],
            options=conversion(options, progress),
            dry_run=options["dry_run"],
        )
    _report(summary, out, options)


def _degrees(options: dict[str, Any]) -> Degrees | None:
    """Give the degrees that were asked for; None where none was."""
    given = {n: options[n] for n in ("tp", "pp", "vpp", "ep", "etp") if options[n] is not None}
    layers = options["pp_layers"]
    return Degrees(**given, pp_layers=layers) if given or layers else None


def _report(summary: Any, out: Path, options: dict[str, Any]) -> None:
    done = "would write" if options["dry_run"] else "wrote"
    lines = [f"not converted: {what}" for what in summary.dropped]
    lines.append(f"{done} {out}: {summary.files} files, {amount(summary.nbytes)} (Megatron layout {summary.degrees})")
    lines += [f"note: {note}" for note in summary.notes]
    show({"out": str(out), "dry_run": options["dry_run"], **asdict(summary)}, options["as_json"], lines)

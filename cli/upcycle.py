"""The command `upcycle`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cli.main import ExitCode
from cli.options import ByteSize, amount, conversion, degree_options, degrees, progress_bar, run_options, show
from moeconv.api import models as api
from moeconv.errors import RecipeError
from moeconv.upcycling.carriers import CARRIERS
from moeconv.upcycling.check import FunctionError
from moeconv.upcycling.files import load_yaml, recipe_table
from moeconv.upcycling.recipe import METHODS, PARTITIONS, PLACEMENTS, ROUTERS, Recipe, from_table, read_prompts


class Layers(click.ParamType[tuple[int, ...]]):
    """Layer numbers and ranges, separated by commas, such as 0,2,8-15."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the text of a list.

        Args:
            value: the text.
            param: the option, for the message.
            ctx: the command, for the message.

        Returns:
            The numbers.
        """
        if isinstance(value, tuple):
            return value
        out: list[int] = []
        for word in value.split(","):
            first, _, last = word.partition("-")
            if not first.isdigit() or not (last.isdigit() if "-" in word else True):
                self.fail(f"{value!r} is no list of layers; give for example 0,2,8-15", param, ctx)
            out += range(int(first), int(last or first) + 1)
        return tuple(out)


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    count = click.IntRange(1)
    for option in (
        click.option("--force", is_flag=True, default=None, help="Go on with what can't train well."),
        click.option("--seed", type=click.IntRange(0), help="Seed of everything drawn; by default 0."),
        click.option(
            "--hidden-average",
            is_flag=True,
            default=None,
            help="hidden: a text counts by its mean over tokens, not its last one.",
        ),
        click.option("--router-std", type=float, help="Standard deviation of drawn router rows; by default 0.02."),
        click.option("--router", type=click.Choice(ROUTERS), help="How router rows are made; by default random."),
        click.option("--no-average", "average", flag_value=False, default=None, help="mix: keep SRC's other weights."),
        click.option("--branch", "branches", multiple=True, help="mix: a further dense checkpoint; may be repeated."),
        click.option("--partition", type=click.Choice(PARTITIONS), help="split: how neurons are dealt out."),
        click.option("--noise-std", type=float, help="noise, mix, expand: standard deviation of the noise on experts."),
        click.option(
            "--drop-per-matrix", is_flag=True, default=None, help="drop: each matrix draws its own neurons anew."
        ),
        click.option("--drop-ratio", type=float, help="drop: share of an expert's neurons drawn anew; by default 0.5."),
        click.option(
            "--no-renormalize",
            "renormalize",
            flag_value=False,
            default=None,
            help="Leave routing weights as the softmax over all experts gives them.",
        ),
        click.option(
            "--scale-placement",
            type=click.Choice(PLACEMENTS),
            help="Which matrices make up for the routing weights; by default down.",
        ),
        click.option("--layers", type=Layers(), help="Layers that become mixtures, such as 0,2,8-15; by default all."),
        click.option(
            "--shared-experts", type=click.IntRange(0), help="Experts of a routed one's width that every token passes."
        ),
        click.option("--granularity", type=count, help="Experts that each copy of the feed-forward part is cut into."),
        click.option("--top-k", type=count, help="Experts a token is routed to."),
        click.option("--experts", type=count, help="Routed experts of a layer, in the result."),
        click.option("--carrier", type=click.Choice(list(CARRIERS)), help="Architecture of the result."),
        click.option("--method", type=click.Choice(METHODS), help="How experts are made; by default copy."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@_recipe_options
@click.option("--prompts", type=click.Path(path_type=Path), help="hidden: a YAML list of texts for each expert.")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML with these options, or a mergekit-moe file.")
@click.option("--hf", is_flag=True, help="Write a Hugging Face folder; by default shards.")
@click.option("--max-shard-size", type=ByteSize(), help="--hf: bytes of a file at most; by default 5GB.")
@degree_options
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--check/--no-check", default=None, help="Compare logits with SRC's first; on where memory allows.")
@click.option("--text", type=click.Path(path_type=Path), help="Compare the loss on this text with SRC's first.")
@run_options
def upcycle(src: str, out: Path, **options: Any) -> None:
    """Turn the dense checkpoint SRC (a Hugging Face folder, or a hub repository's id) into the mixture of experts OUT.

    Example: moeconv upcycle mistralai/Mistral-7B-v0.1 moe --method virtual-group --experts 32 --granularity 4 --ep 8
    """
    recipe, dtype = _recipe(src, options)
    with progress_bar("upcycle") as progress:
        try:
            done = api.upcycle(
                src,
                out,
                recipe,
                degrees(options),
                hf=options["hf"],
                max_shard_size=options["max_shard_size"],
                revision=options["revision"],
                dtype=dtype,
                check=options["check"],
                text=options["text"],
                options=conversion(options, progress),
                dry_run=options["dry_run"],
            )
        except FunctionError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(ExitCode.DIFFERENT) from None
    show(dict(done.details), options["as_json"], _screen(dict(done.details)))


def _recipe(src: str, options: dict[str, Any]) -> tuple[Recipe, str | None]:
    table = recipe_table(options["recipe"], src) if options["recipe"] else {}
    dtype = table.pop("dtype", None)
    names = Recipe.__dataclass_fields__
    given = {k: v for k, v in options.items() if k in names and k != "prompts" and v is not None and v != ()}
    recipe_fields = {k.replace("-", "_"): v for k, v in table.items()} | given
    if options["prompts"] is not None:
        entries = load_yaml(options["prompts"])
        if not isinstance(entries, list):
            raise RecipeError(f"{options['prompts']}: expected a list, with the texts of each expert")
        where = str(options["prompts"])
        texts = [read_prompts(entry, where) for entry in entries]
        recipe_fields["prompts"] = [
            {"positive_prompts": list(t.positive), "negative_prompts": list(t.negative)} for t in texts
        ]
    return from_table(recipe_fields, str(options["recipe"] or "command line")), dtype


def _screen(value: dict[str, Any]) -> list[str]:
    exact = "computes what the source computes" if value["exact"] else "; ".join(value["inexact_because"])
    alike = list(value["expert_similarity"].values())
    count = len(value["files"])
    done = f"{count} file{'s' if count > 1 else ''}, {amount(value['bytes'])}"
    rate = amount(value["bytes"] / max(value["seconds"], 1e-9))
    lines = [
        f"{value['out']}: would hold {done}"
        if value["dry_run"]
        else f"{value['out']}: {done} in {value['seconds']:.1f} s ({rate}/s)",
        f"  method      {value['method']}: {value['formula']}",
        f"  mixture     {value['carrier']}, {value['experts']} experts of width {value['expert_width']}, {value['top_k']} for a token",
        f"  parameters  {value['parameters']:,} total, {value['active_parameters']:,} active for a token ({value['source']['parameters']:,} in the source)",
        "  made        " + ", ".join(f"{amount(size)} {kind}" for kind, size in value["bytes_by_kind"].items()),
        f"  similarity  of experts: mean cosine {sum(alike) / len(alike):.4f} ({min(alike):.4f} to {max(alike):.4f} over layers)",
        f"  function    {exact}",
    ]
    if value["logits_error"] is not None:
        lines.append(f"  logits      differ by {value['logits_error']:.1e} of the largest, in fp32")
    elif value["check"] != "left out":
        lines.append(f"  logits      check {value['check']}")
    if value["loss"] is not None:
        lines.append(
            f"  loss        {value['source_loss']:.4f} -> {value['loss']:.4f} nats a token (source -> mixture)"
        )
    return lines + [f"  note        {note}" for note in value["notes"]]

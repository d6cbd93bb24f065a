"""The command `generate`: the trainer's model writes, from any form of a checkpoint, over any ranks."""

from __future__ import annotations

import sys

import click

from cli.train import run_or_launch
from runtime.settings.generation import for_generation


@click.command(
    "generate",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    epilog="FLAGS: --prompt TEXT... (- is standard input), --chat, --messages FILE, --system TEXT, --max-new-tokens N, "
    "--temperature X, --top-p X, --top-k N, --seed N, --json, --chat-template FILE, --tokenizer-model PATH, --dtype, and the "
    "trainer's degrees of parallelism (docs/trainer.md).",
)
@click.option("--nproc-per-node", type=click.IntRange(1), help="Processes; by default one a GPU, else one.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CKPT --prompt TEXT|--chat|--messages FILE [FLAGS]")
def generate(nproc_per_node: int | None, words: tuple[str, ...]) -> None:
    """Go on with a text, or answer, with CKPT: a sharded checkpoint, a Hugging Face folder, or a run, of adapters, too.

    The likeliest token is taken each time, unless --temperature is above 0. What is written comes on standard output as it
    is written, everything else on standard error.

    Example: moeconv generate run --chat --temperature 0.7 --top-p 0.9
    """
    if not words or words[0].startswith("-"):
        raise click.UsageError('CKPT comes first: moeconv generate CKPT --prompt "Once upon a time"')
    names = {word.partition("=")[0] for word in words}
    if not names & {"--prompt", "--chat", "--messages"}:
        raise click.UsageError("nothing to go on with: give --prompt TEXT, --chat or --messages FILE")
    sys.exit(run_or_launch(["--load", *words], nproc_per_node, "moeconv generate", for_generation))

"""The entry point: commands are loaded when they are called, so that help is instant."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from moeconv.errors import MoeconvError
from moeconv.extras import needed

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Conversions use numpy to move bytes, never for linear algebra: its threads would only cost start-up time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class ExitCode(IntEnum):
    """What the program's exit code says."""

    OK = 0
    FAILED = 1  # an error; no output was finished
    USAGE = 2  # click's own: the command line is wrong
    DIFFERENT = 3  # verify or diff found a difference
    UNPRINTED = 4  # everything was done, but the result could not be printed
    INTERRUPTED = 130  # by Ctrl-C, or 128 and the number of another signal


# section -> command -> (module, one line of help)
_COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Convert": {
        "import-hf": ("cli.convert:import_hf", "Turn a Hugging Face checkpoint into shards."),
        "reshard": ("cli.convert:reshard", "Turn shards into shards of another layout."),
        "export-hf": ("cli.convert:export_hf", "Turn shards back into a Hugging Face checkpoint."),
        "import-megatron": ("cli.megatron:import_megatron", "Turn a Megatron-Core checkpoint into shards."),
        "export-megatron": (
            "cli.megatron:export_megatron",
            "Turn shards or a Hugging Face checkpoint into a Megatron-Core one.",
        ),
    },
    "Upcycle": {
        "upcycle": ("cli.upcycle:upcycle", "Turn a dense checkpoint into a mixture of experts."),
    },
    "Train": {
        "plan": ("cli.plan:plan", "Say whether a training run fits, and how fast it will be."),
        "train": ("cli.train:train", "Train a checkpoint on the GPUs of this machine, or of several."),
        "prepare-data": ("cli.data:prepare_data", "Tokenize text for training, on all cores."),
        "eval": ("cli.evaluate:evaluate", "Measure a checkpoint's loss on text, per token and per byte."),
        "generate": ("cli.generate:generate", "Go on with a text, or answer, with a checkpoint or a run."),
        "merge": ("cli.adapters:merge_adapter", "Add trained adapters to a checkpoint's weights."),
        "export-adapter": ("cli.adapters:export_adapter", "Turn trained adapters into a PEFT folder."),
        "report": ("cli.report:report", "Show training runs side by side in one page."),
    },
    "Look and check": {
        "inspect": ("cli.check:inspect", "Show a checkpoint's model, layout and ranks."),
        "verify": ("cli.check:verify", "Check every checksum, or compare byte for byte."),
        "diff": ("cli.check:diff", "Show what differs between two checkpoints."),
    },
}
_TARGETS = {name: target for section in _COMMANDS.values() for name, (target, _) in section.items()}


class Commands(click.Group):
    """A group that imports a command's module when the command is called, and lists commands by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the commands' names in the order of the help."""
        return list(_TARGETS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command, or give None where there is no such command."""
        if name not in _TARGETS:
            return None
        module, attribute = _TARGETS[name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, section by section, without importing any."""
        for section, commands in _COMMANDS.items():
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name or an option's, without importing any command."""
        from click.shell_completion import CompletionItem

        named = ((name, text) for commands in _COMMANDS.values() for name, (_, text) in commands.items())
        found = [CompletionItem(name, help=text) for name, text in named if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of ours is one line on stderr and exit code 1."""
        try:
            with needed("this command"):
                return super().invoke(ctx)
        except MoeconvError as error:
            _tell(f"error: {error}")
            ctx.exit(ExitCode.FAILED)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # whoever reads the output has seen enough
                raise
            _tell(f"error: {error.filename or 'the system'}: {error.strerror or error}; nothing was finished")
            ctx.exit(ExitCode.FAILED)
        except MemoryError:
            _tell("error: there is not enough memory; nothing was finished")
            ctx.exit(ExitCode.FAILED)
        except KeyboardInterrupt as stopped:
            notes = getattr(stopped, "__notes__", ["nothing was finished"])
            _tell(f"interrupted: {'; '.join(notes)}")
            ctx.exit(stopped.code if isinstance(stopped, Stopped) else ExitCode.INTERRUPTED)


class Stopped(KeyboardInterrupt):
    """Another signal than Ctrl-C asks the program to end; it cleans up the same way."""

    def __init__(self, number: int) -> None:
        """Keep the exit code that says which signal it was."""
        super().__init__()
        self.code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _tell(message: str) -> None:
    """Print a line on stderr; where it can't be printed, the exit code must do."""
    with suppress(OSError):
        click.echo(message.encode("utf-8", "backslashreplace").decode(), err=True)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moeconv")
def main() -> None:
    """Convert mixture-of-experts checkpoints bit for bit, in bounded memory, at the speed of a copy.

    Example: moeconv import-hf mistralai/Mixtral-8x7B-v0.1 ckpt --ep 4 --tp 4

    Tab completion: eval "$(_MOECONV_COMPLETE=bash_source moeconv)" (or zsh_source, fish_source).
    """


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the program with the given command line words, by default those of the process."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # temporary folders are removed, and what can be resumed says so
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    main(args=list(arguments) if arguments is not None else sys.argv[1:], prog_name="moeconv")


if __name__ == "__main__":
    run()

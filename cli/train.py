"""The command `train`: the trainer with its own flags, on the GPUs that are found, without a launcher's command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from moeconv.errors import MoeconvError
from runtime.settings.flags import Given, parse_flags

USER_ERROR = 2
# What torchrun calls a node's place in the job, and the variables in which clusters say it.
_NODES = {"nnodes": ("NNODES", "SLURM_NNODES"), "node-rank": ("NODE_RANK", "SLURM_NODEID")}
_MASTER = {"master-addr": "MASTER_ADDR", "master-port": "MASTER_PORT"}


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": [], "allow_interspersed_args": True}
)
@click.option("--nproc-per-node", type=click.IntRange(1))
@click.option("--max-restarts", type=click.IntRange(0), default=0)
@click.option("--example", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def train(nproc_per_node: int | None, max_restarts: int, example: Path | None, flags: tuple[str, ...]) -> None:
    """Train a checkpoint on the GPUs of this machine (else one process), or on several machines.

    Example: moeconv train --load ckpt --data text.jsonl --save run --train-iters 1000
    """
    if example is not None:
        from moeconv.checkpoint import open_checkpoint
        from runtime.settings.example import example as write

        click.echo(write(open_checkpoint(example).model, example), nl=False)
        return
    if {"-h", "--help"} & set(flags) or not flags:
        click.echo(_HELP)
    try:
        parse_flags(flags or ("--help",), "moeconv train")  # what is misspelt is said before any process starts
    except MoeconvError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(USER_ERROR)
    sys.exit(launch(flags, nproc_per_node, max_restarts))


_HELP = """\
moeconv train [--nproc-per-node N] [--max-restarts N] FLAGS     train, on every GPU of this machine or on N processes
moeconv train --example MODEL > run.yaml                        write a commented --config file for a checkpoint

On several machines, start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (under Slurm the first two
are found). FLAGS are those of `torchrun [...] -m runtime.train`.

Example: moeconv train --load ckpt --data corpus.jsonl --save run --train-iters 1000 --global-batch-size 128 --bf16
"""


def run_or_launch(
    flags: Sequence[str], nproc_per_node: int | None, program: str, judge: Callable[[Given], object] | None = None
) -> int:
    """Do a job with the processes that torchrun has started, or start them.

    Args:
        flags: the trainer's command line.
        nproc_per_node: as for `launch`.
        program: how `--help` names the program.
        judge: raises a MoeconvError for flags that can't be meant.

    Returns:
        The exit status.
    """
    try:
        given = parse_flags(flags, program)  # what is misspelt is said before any process starts
        if judge is not None:
            judge(given)
    except MoeconvError as error:
        click.echo(f"error: {error}", err=True)
        return USER_ERROR
    if "RANK" in os.environ:
        from runtime.train import main

        return main(flags)
    return launch(flags, nproc_per_node, 0)


def launch(flags: Sequence[str], nproc_per_node: int | None, max_restarts: int) -> int:
    """Start the trainer's processes and wait for them.

    Args:
        flags: the trainer's command line.
        nproc_per_node: processes of this machine; None takes one a GPU, or one.
        max_restarts: how often a job that failed is started again.

    Returns:
        The exit status.

    Raises:
        UsageError: there are several machines and it isn't said how they meet.
    """
    import torch

    nodes = _nodes()
    count = nproc_per_node or torch.cuda.device_count() or 1
    if count == 1 and not nodes and not max_restarts:
        from runtime.train import main

        return main(flags)
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks speak for themselves
    meeting = nodes or ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    options = ["--nproc-per-node", str(count), "--max-restarts", str(max_restarts), *meeting]
    try:
        words = [*options, "-m", "runtime.train", *flags]
        torchrun.run(torchrun.parse_args(words))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:  # the rank has said it
            return USER_ERROR
        name = failure.signal_name()
        how = name if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        click.echo(f"error: rank {rank} ended with {how}; its own report is above", err=True)
        return 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _nodes() -> list[str]:
    """Give torchrun's options for a job of several machines; none for one machine."""
    found = {
        option: next((os.environ[name] for name in names if os.environ.get(name)), "")
        for option, names in _NODES.items()
    }
    if found["nnodes"] in ("", "1"):
        return []
    found |= {option: os.environ.get(name, "") for option, name in _MASTER.items()}
    found["master-port"] = found["master-port"] or "29500"
    missing = [option.upper().replace("-", "_") for option, value in found.items() if not value]
    if missing:
        raise click.UsageError(f"NNODES is {found['nnodes']}: {' and '.join(missing)} must be set on each machine, too")
    return [word for option, value in found.items() for word in (f"--{option}", value)]

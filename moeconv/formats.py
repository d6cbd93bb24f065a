"""Opening a checkpoint of whatever kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import open_megatron
from moeconv.megatron.source import is_megatron


def open_any(path: Path, **options: Any) -> Checkpoint:
    """Open a checkpoint of any kind: Megatron's, a sharded one, a save of adapters, or a Hugging Face folder.

    Args:
        path: the folder.
        options: what `open_megatron` takes, for a Megatron checkpoint.

    Returns:
        The checkpoint.

    Raises:
        MoeconvError: as `open_megatron` and `open_checkpoint`.
    """
    if is_megatron(path):
        return as_checkpoint(open_megatron(path, **options))
    return open_checkpoint(path, adapters=True)

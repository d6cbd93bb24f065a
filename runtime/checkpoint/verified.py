"""Loading that proves what it loads: each rank checks the rectangles that it reads whole, all ranks share those read in part."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from moeconv.checking import check_piece
from moeconv.checkpoint import Checkpoint
from moeconv.pieces import Piece
from moeconv.reading import VerifiedReader
from runtime.checkpoint.rectangles import READERS, Read


def load_verified(checkpoint: Checkpoint, load: Callable[[Read], None], device: torch.device) -> None:
    """Load a checkpoint and compare everything that any rank read of it with its checksums. Collective.

    A run that goes on in its own layout reads every rectangle whole, and hashes it on the way. In another layout ranks
    read parts; then each rectangle that none has read whole is read once more, by one rank. Checkpoints without checksums,
    such as a Hugging Face folder's, are loaded as they are.

    Args:
        checkpoint: the opened checkpoint, the same on each rank.
        load: loads this rank's part with the reader that it is given.
        device: where tensors of collectives live.

    Raises:
        DamageError: bytes differ from their checksum; names file and tensor.
        MoeconvError: a tensor is missing, or can't be read.
    """
    if not checkpoint.checksums:
        load(checkpoint.read)
        return
    reader = VerifiedReader(checkpoint)
    load(reader.read)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda piece: check_piece(checkpoint, piece), _share_of_rest(checkpoint, reader, device)):
            pass


def _share_of_rest(checkpoint: Checkpoint, reader: VerifiedReader, device: torch.device) -> list[Piece]:
    """Give this rank's share of the rectangles that some rank has read in part and none whole."""
    pieces = [piece for found in checkpoint.pieces.values() for piece in found]
    keys = {(piece.file, piece.tensor): number for number, piece in enumerate(pieces)}
    read = torch.zeros(2, len(pieces), dtype=torch.uint8)
    for row, touched in enumerate((reader.verified, reader.unverified)):
        read[row, [keys[key] for key in touched]] = 1
    if dist.is_initialized():
        everywhere = read.to(device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
        read = everywhere.cpu()
    whole, parts = read.bool()
    rest = [pieces[number] for number in torch.nonzero(parts & ~whole).flatten().tolist()]
    rest = [piece for piece in rest if (piece.file, piece.tensor) in checkpoint.checksums]
    # The largest first, dealt out in turn: shares differ by one rectangle at most.
    rest.sort(key=lambda piece: -piece.nbytes)
    return rest[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rest

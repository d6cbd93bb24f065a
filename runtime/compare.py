"""`python -m runtime.compare CKPT HF`: the trainer's logits beside those that transformers computes from a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import MoeconvError
from moeconv.forward import fixed_tokens, relative_difference, transformers_logits
from runtime.checkpoint.verified import load_verified
from runtime.engine import Engine
from runtime.model.recompute import RecomputeConfig
from runtime.model.support import check_supported
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh


def runtime_logits(path: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Compute logits with the trainer's model, on one rank in fp32.

    Args:
        path: a checkpoint of any layout.
        tokens_BS: token ids [B, S], int64.

    Returns:
        Logits [B, S, V], fp32.

    Raises:
        MoeconvError: the checkpoint can't be read, or the trainer can't hold its architecture.
    """
    checkpoint = open_checkpoint(path)
    model = checkpoint.model
    check_supported(model, path)
    moe = MoEConfig(router=model.compute.router) if model.compute.router is not None else None
    parallel = ParallelConfig()
    mesh = ParallelMesh(parallel)
    cpu = torch.device("cpu")
    engine = Engine(model, torch.float32, parallel, moe, OptimConfig(), RecomputeConfig(), mesh, cpu)
    load_verified(checkpoint, engine.load_state, cpu)
    engine.module.eval()
    with torch.no_grad():
        logits_SBV: torch.Tensor = engine.module[0](tokens_BS)
    return logits_SBV.transpose(0, 1)[..., : model.sizes["vocab"]].float()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the largest difference, and give the exit code: 0 within the tolerance, 3 beyond it, 1 for an error."""
    parser = argparse.ArgumentParser(prog="python -m runtime.compare", description=__doc__)
    parser.add_argument("ckpt", type=Path, help="a checkpoint of any layout")
    parser.add_argument("hf", type=Path, help="a Hugging Face folder of the same model")
    parser.add_argument("--num-tokens", type=int, default=256, help="tokens to compare on")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative to the largest logit")
    options = parser.parse_args(arguments)
    try:
        vocab = open_checkpoint(options.ckpt).model.sizes["vocab"]
        tokens_BS = fixed_tokens(vocab, options.num_tokens)
        ours, theirs = runtime_logits(options.ckpt, tokens_BS), transformers_logits(options.hf, tokens_BS)
    except MoeconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    gap = relative_difference(ours, theirs)
    print(f"{options.ckpt}: the trainer's logits and transformers' of {options.hf} differ by {gap:.2e} of the largest")
    return 0 if gap <= options.tolerance else 3


if __name__ == "__main__":
    raise SystemExit(main())

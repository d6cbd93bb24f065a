"""Losses of a small Mixtral in FP8 beside fp32's, in plain torch on a CPU: `python -m benchmarks.fp8_losses [STEPS]`.

Everything is fp32 but the operands of products, which are rounded to 8 bits as on a GPU.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.train_step import FP8_RECIPES, make_engine, mixtral, text_batch
from runtime.fp8.config import Fp8Config

VOCAB, EVERY = 128, 5


def curve(fp8: Fp8Config | None, num_steps: int) -> list[float]:
    """Losses of the steps."""
    model = mixtral(hidden=128, layers=2, heads=4, kv_heads=4, head_dim=32, ffn=128, vocab=VOCAB, experts=4)
    engine = make_engine(model, torch.float32, torch.device("cpu"), lr=3e-3, fp8=fp8)
    steps = ([text_batch(VOCAB, 4, 64, 2 * step + m) for m in range(2)] for step in range(num_steps))
    return [engine.train_step(batches).lm_loss for batches in steps]


def main() -> None:
    """Print the table."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    curves = {"fp32": curve(None, num_steps)}
    for recipe in FP8_RECIPES:
        for kind in ("hybrid", "e4m3"):
            curves[f"{kind}, {recipe}"] = curve(Fp8Config(format=kind, recipe=recipe), num_steps)  # type: ignore[arg-type]
    print("| step | " + " | ".join(curves) + " |\n|" + " --- |" * (len(curves) + 1))
    for step in range(0, num_steps, EVERY):
        print(f"| {step + 1} | " + " | ".join(f"{losses[step]:.4f}" for losses in curves.values()) + " |")
    exact = curves.pop("fp32")
    for name, losses in curves.items():
        print(f"{name}: largest distance {max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)):.2%}")


if __name__ == "__main__":
    main()

"""Loss curves by the types of masters, moments and gradient sums, beside fp32: `python -m benchmarks.state_types [options]`.

A small Mixtral on text with structure to learn, eight sequences a step, in one micro-batch and in eight; on
the GPU where there is one. Bytes are those of weights, gradient sums, masters and moments that the engine's own tensors take.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.train_step import make_engine, memory_by_kind, mixtral, text_batch

SEQUENCES, POSITIONS, VOCABULARY = 8, 64, 128
REMAINDER = {"master_weights": "remainder"}
MOMENTS = {"moments_dtype": "bfloat16"}
GRADIENTS = {"main_grads_dtype": "bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "fp32 masters, moments, gradients": {},
    "masters as remainders": REMAINDER,
    "moments in bf16": MOMENTS,
    "gradients in bf16": GRADIENTS,
    "remainders, moments in bf16": REMAINDER | MOMENTS,
    "remainders, moments and gradients in bf16": REMAINDER | MOMENTS | GRADIENTS,
}
STATE = ("weights", "gradients", "masters", "moments")


def curve(
    dtype: torch.dtype, device: torch.device, steps: int, number: int, **options: Any
) -> tuple[list[float], float]:
    """Train for some steps.

    Args:
        dtype: of the weights.
        device: where.
        steps: how many.
        number: micro-batches of a step.
        **options: of the optimizer.

    Returns:
        The loss of each step, and the bytes of state a parameter.
    """
    model = mixtral(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, vocab=VOCABULARY)
    engine = make_engine(model, dtype, device, lr=3e-3, **options)
    losses = []
    for step in range(steps):
        whole = text_batch(VOCABULARY, SEQUENCES, POSITIONS, step)
        parts = zip(whole.tokens.chunk(number), whole.labels.chunk(number), strict=True)
        batches = [type(whole)(tokens=tokens, labels=labels) for tokens, labels in parts]
        losses.append(engine.train_step(batches).lm_loss)
    sizes = memory_by_kind(engine)
    return losses, sum(sizes[kind] for kind in STATE) / sum(p.numel() for p in engine.module.parameters())


def main() -> None:
    """Parse the options and print a table for each number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, SEQUENCES], help="divisors of eight")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}")
    shown = [step for step in range(args.steps) if step % max(1, args.steps // 4) == 0 or step == args.steps - 1]
    for number in args.microbatches:
        exact, _ = curve(torch.float32, torch.device("cpu"), args.steps, number)
        print(f"\n{number} micro-batches a step\n")
        print(
            f"| bf16 with | bytes a parameter | {' | '.join(f'step {step + 1}' for step in shown)} | from fp32, at most |"
        )
        print(f"| --- | --- |{' --- |' * (len(shown) + 1)}")
        print(f"| (all in fp32, CPU) | 16 | {' | '.join(f'{exact[step]:.4f}' for step in shown)} | |", flush=True)
        for name, options in KINDS.items():
            losses, size = curve(torch.bfloat16, device, args.steps, number, **options)
            worst = max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))
            numbers = " | ".join(f"{losses[step]:.4f}" for step in shown)
            print(f"| {name} | {size:.0f} | {numbers} | {worst:.2%} |", flush=True)


if __name__ == "__main__":
    main()

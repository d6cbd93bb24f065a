"""How fast a quantised weight's numbers are made: bytes read and written a second, beside a copy's.

python -m benchmarks.dequantise
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from runtime.quantised.sizes import BaseDtype
from runtime.quantised.weight import QuantisedWeight, Workspace, make_format

SHAPES = {"Qwen3-30B-A3B gate and up": (128, 1536, 2048), "Mixtral 8x7B down": (8, 4096, 14336)}
REPETITIONS = 20


def seconds(work: Callable[[], object]) -> float:
    """Median time of a repetition on the GPU."""
    times = []
    for _ in range(REPETITIONS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def main() -> None:
    """Measure each format and shape."""
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    for title, shape in SHAPES.items():
        source = torch.randn(shape, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / seconds(lambda target=target, source=source: target.copy_(source))
        kinds: list[tuple[BaseDtype, bool]] = [("nf4", False), ("nf4", True), ("fp8", False)]
        for kind, double in kinds:
            workspace = Workspace(torch.bfloat16, device)
            weight = QuantisedWeight(torch.Size(shape), shape[0], make_format(kind, double=double), workspace)
            for place in range(shape[0]):
                weight.take(place, source[place])
            took = seconds(weight.dense)
            rate = (weight.nbytes + source.nbytes) / took
            name = kind + (" with quantised scales" if double else "")
            print(
                f"{title}, {name}: {took * 1e3:.3f} ms, {rate / 1e12:.2f} TB/s, {rate / copy:.0%} of a copy", flush=True
            )


if __name__ == "__main__":
    main()

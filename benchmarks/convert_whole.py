"""Convert Mixtral 8x7B at its true size: `python -m benchmarks.convert_whole [--layers 32] [--folder DIR] [--other DIR]`.

Writes 93.4 GB of random bytes under the hub's names and shapes, runs import-hf, reshard and export-hf as a user would, once each,
every one until its bytes are on the disk, and compares what comes back file by file. Each reads from one of the two folders and
writes to the other, and what it read goes when it is done: a disk must hold two such models, or one where the other folder is on
another disk or in memory. Prints seconds, GB/s of the model's bytes, and the highest resident memory of any process that ran.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.convert import LAYOUT, build, mixtral_config
from benchmarks.timing import MOECONV, Row, digests

LAYERS = 32
STEPS = (("import-hf", *LAYOUT), ("reshard", "--pp", "4", "--ep", "2"), ("export-hf",))


def convert(config: dict[str, Any], folder: Path, other: Path) -> Iterator[dict[str, Any]]:
    """Build a model and take it through every step.

    Args:
        config: the model's config.json.
        folder: an empty one, for what is built and what is made of it in turn.
        other: likewise; may be on another disk.

    Yields:
        Of each command what it took.

    Raises:
        RuntimeError: a command failed, or the files that came back aren't those that were built.
    """
    source = folder / "source"
    nbytes = build(source, config, sparse=False)
    expected = digests(source)
    for number, (name, *words) in enumerate(STEPS):
        out = (other, folder)[number % 2] / f"{number}-{name}"
        out.parent.mkdir(exist_ok=True)
        yield _run(name, nbytes, [name, str(source), str(out), *words])
        shutil.rmtree(source)
        source = out
    if digests(source) != expected:
        raise RuntimeError(f"{source} differs from what was built")


def _run(name: str, nbytes: int, words: list[str]) -> dict[str, Any]:
    row = Row(name, nbytes)
    row.run([*MOECONV, *words])
    seconds = row.seconds[0]
    return {
        "command": name,
        "gb": round(nbytes / 1e9, 2),
        "seconds": round(seconds, 2),
        "gb_per_second": round(nbytes / 1e9 / seconds, 2),
        "processor_seconds_per_gb": round(row.processor[0] / nbytes * 1e9, 2),
        "peak_mb": round(row.memory / 1e6),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model; default: all 32")
    parser.add_argument("--folder", type=Path, help="default: that of temporary files")
    parser.add_argument("--other", type=Path, help="on another disk, or in memory; default: the same disk")
    args = parser.parse_args()
    config = mixtral_config(LAYERS) | {"num_hidden_layers": args.layers}
    with (
        tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as folder,
        tempfile.TemporaryDirectory(prefix="convert-", dir=args.other or args.folder) as other,
    ):
        for found in convert(config, Path(folder), Path(other)):
            print(json.dumps(found), flush=True)
    print("what came back is what was built, file by file")
    return 0


if __name__ == "__main__":
    sys.exit(main())

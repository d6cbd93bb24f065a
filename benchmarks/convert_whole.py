"""Import and export Mixtral 8x7B at its true size, once each: `python -m benchmarks.convert_whole [--layers 32] [--folder DIR]`.

Writes 93.4 GB of random bytes under the hub's names and shapes, runs import-hf and export-hf as a user would, each until its bytes
are on the disk, and compares what comes back file by file. The disk holds two such models at a time: the source goes when it has
been imported. Prints seconds, GB/s of the model's bytes, and the highest resident memory of any process that ran.
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


def convert(config: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Build a model, import it and export it again.

    Args:
        config: the model's config.json.
        folder: an empty one, on a disk with room for two models.

    Yields:
        Of each command what it took.

    Raises:
        RuntimeError: a command failed, or the files that came back aren't those that were built.
    """
    source, shards, out = (folder / name for name in ("source", "shards", "out"))
    nbytes = build(source, config, sparse=False)
    expected = digests(source)
    yield _run("import-hf", nbytes, ["import-hf", str(source), str(shards), *LAYOUT])
    shutil.rmtree(source)
    yield _run("export-hf", nbytes, ["export-hf", str(shards), str(out)])
    if digests(out) != expected:
        raise RuntimeError(f"{out} differs from what was built")


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
    parser.add_argument("--folder", type=Path, help="disk with room for two models; default: that of temporary files")
    args = parser.parse_args()
    config = mixtral_config(LAYERS) | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as folder:
        for found in convert(config, Path(folder)):
            print(json.dumps(found), flush=True)
    print("what came back is what was built, file by file")
    return 0


if __name__ == "__main__":
    sys.exit(main())

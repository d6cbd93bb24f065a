"""Time upcycling beside `cp -r` of what it writes: `python -m benchmarks.upcycle [--rounds 3] [--json]`.

Builds a dense Llama of 0.7 GB in bf16 and upcycles it to 3.5 GB (8 copies of each feed-forward part) by each method, as a user would,
each as its own process, in turn with `cp -r` of the output, the source in the page cache and nothing left to write back. `cp -r` returns
before its bytes are on disk; moeconv only after, so `cp -r; sync` is shown as well. Prints median seconds and the highest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.timing import MOECONV, Row
from moeconv.io.safetensors import encode_header

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "head_dim": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LAYOUT = ["--no-check", "--tp", "2", "--ep", "4"]
METHODS = {
    "copy": [],
    "copy --no-sync": ["--no-sync"],
    "virtual-group --no-sync": ["--method", "virtual-group", "--granularity", "4", "--experts", "32", "--no-sync"],
    "virtual-group": ["--method", "virtual-group", "--granularity", "4", "--experts", "32"],
    "noise": ["--method", "noise"],
    "drop": ["--method", "drop"],
    "split (1 GB)": ["--method", "split", "--experts", "8"],
    "split by clusters (1 GB)": ["--method", "split", "--experts", "8", "--partition", "clusters"],
}


def build(folder: Path, sparse_layers: int = 0) -> None:
    """Write the dense Llama; with `sparse_layers` one of that many layers of a 7B model's sizes, all zeros."""
    config = CONFIG | {"num_hidden_layers": sparse_layers or CONFIG["num_hidden_layers"]}
    if sparse_layers:
        config |= {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (vocab, d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (n, d) for p, n in zip("qkvo", (d, kv, kv, d), strict=True)}
        shapes |= {
            at + "mlp.gate_proj.weight": (f, d),
            at + "mlp.up_proj.weight": (f, d),
            at + "mlp.down_proj.weight": (d, f),
        }
    header = encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(header.raw)
        for shape in shapes.values() if not sparse_layers else ():
            out.write((0.02 * random.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16).tobytes())
        out.truncate(header.file_size)


def measure(work: Path, rounds: int) -> list[Row]:
    """Build the model and time each method, round after round, beside copies of what `copy` writes.

    Raises:
        RuntimeError: a command failed.
    """
    source, out, copied = work / "dense", work / "moe", work / "copied"
    build(source)
    rows: dict[str, Row] = {}
    for _ in range(rounds):
        for name, words in METHODS.items():
            row = rows.setdefault(name, Row(name, 0))
            row.run([*MOECONV, "upcycle", str(source), str(out), *LAYOUT, *words])
            row.nbytes = sum(path.stat().st_size for path in out.iterdir())
            if name == "copy":
                shutil.copytree(
                    out, copied
                )  # pages that were just freed are faster to fill: each command finds as many
                shutil.rmtree(copied)
                for what, command in (("cp -r", "true"), ("cp -r; sync", f"sync -f '{copied}'")):
                    reference = rows.setdefault(what, Row(what, row.nbytes))
                    reference.run(["sh", "-c", f"cp -r '{out}' '{copied}' && {command}"])
                    shutil.rmtree(copied)
            shutil.rmtree(out)
    return [rows.pop("cp -r"), rows.pop("cp -r; sync"), *rows.values()]


def report(rows: list[Row]) -> list[dict[str, Any]]:
    """Give a row for each command, its time a byte as a ratio to that of `cp -r` and of `cp -r; sync`."""
    base, synced = (
        next(statistics.median(r.seconds) / r.nbytes for r in rows if r.name == name)
        for name in ("cp -r", "cp -r; sync")
    )
    return [
        {
            "command": row.name,
            "seconds": round(statistics.median(row.seconds), 2),
            "gb_per_s": round(row.nbytes / statistics.median(row.seconds) / 1e9, 2),
            "ratio_to_cp": round(statistics.median(row.seconds) / row.nbytes / base, 2),
            "ratio_to_cp_sync": round(statistics.median(row.seconds) / row.nbytes / synced, 2),
            "peak_mb": round(row.memory / 1e6),
            "runs": [round(s, 2) for s in row.seconds],
        }
        for row in rows
    ]


def show(table: list[dict[str, Any]]) -> None:
    """Print the rows of a report."""
    print(f"{'command':<38} {'seconds':>8} {'GB/s':>6} {'to cp':>7} {'to cp; sync':>12} {'peak MB':>8}  runs")
    for row in table:
        print(
            f"{row['command']:<38} {row['seconds']:8.2f} {row['gb_per_s']:6.2f} {row['ratio_to_cp']:6.2f}x "
            f"{row['ratio_to_cp_sync']:11.2f}x {row['peak_mb']:8}  {' '.join(map(str, row['runs']))}"
        )


def main() -> None:
    """Parse the command line, measure, print and clean up."""
    parser = argparse.ArgumentParser(description="Time moeconv upcycle beside cp -r of what it writes.")
    parser.add_argument("--folder", type=Path, help="where to build (8 GB, removed again); default: a new one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument(
        "--large", type=int, default=0, metavar="LAYERS", help="also virtual-group of a 7B's layers, as holes"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeconv-bench-", dir=flags.folder) as name:
        rows = measure(Path(name), flags.rounds)
        if flags.large:
            build(Path(name) / "large", flags.large)
            row = Row(f"virtual-group, 7B x {flags.large}/32", 0)
            row.run(
                [
                    *MOECONV,
                    "upcycle",
                    str(Path(name) / "large"),
                    str(Path(name) / "moe"),
                    *LAYOUT,
                    *METHODS["virtual-group"],
                ]
            )
            row.nbytes = sum(path.stat().st_size for path in (Path(name) / "moe").iterdir())
            rows.append(row)
    table = report(rows)
    if flags.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": table}, indent=2))
        return
    print(f"{os.cpu_count()} cores, median of {flags.rounds}")
    show(table)


if __name__ == "__main__":
    main()

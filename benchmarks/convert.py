"""Time the conversions beside `cp -r` of the same files: `python benchmarks/convert.py [--rounds 3] [--scale 10] [--json]`.

Builds a Mixtral of 2.9 GB (random bytes) and runs import-hf, reshard, export-hf and verify, and export-megatron and
import-megatron of both formats, as a user would, each as its own process, round after round in turn with `cp -r`, with the
source in the page cache and nothing left to write back. `cp -r` returns before its bytes are on disk, and so do the
conversions with --no-sync; by default they wait for the disk, as `cp -r; sync` does. Prints the median seconds, and the highest
resident memory of any process that ran. The exported files are compared with the source's, and what came back from Megatron's
formats tensor by tensor.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.io.safetensors import encode_header
from moeconv.pieces import TensorInfo

MAX_FILE_BYTES = 500_000_000
MOECONV = [sys.executable, "-m", "cli"]
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""


# A process's peak begins with that of the process that started it, so a small one stands between. It measures as GNU time
# does: the highest of the command and of the processes that it waited for.
LAUNCHER = """
import resource, subprocess, sys, time
begin = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@dataclass
class Row:
    """What was measured of one command: seconds of each run, by the clock and of processors, and the highest resident memory in bytes."""

    name: str
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    memory: int = 0
    prime: Path | None = None
    """A folder to copy and delete first: memory that was just freed is faster to fill, and so each command finds as much."""

    def run(self, command: list[str]) -> None:
        """Run a command and add what it took.

        Raises:
            RuntimeError: it failed.
        """
        os.sync()
        if self.prime is not None:
            scratch = self.prime.with_name("scratch")
            shutil.copytree(self.prime, scratch)
            shutil.rmtree(scratch)
            os.sync()
        launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
        output = subprocess.run(
            launched, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent
        ).stdout
        code, seconds, processor, kib = output.split()
        if code != "0":
            raise RuntimeError(f"{' '.join(command)} failed with exit code {code}")
        self.seconds.append(float(seconds))
        self.processor.append(float(processor))
        self.memory = max(self.memory, int(kib) * 1024)
        print(f"{self.name}: {float(seconds):.2f} s", file=sys.stderr, flush=True)


def mixtral_config(scale: int) -> dict[str, Any]:
    """Give the config of a Mixtral of about 2.9 GB in bf16, or of `scale` times that in the tensor sizes of Mixtral-8x7B."""
    large = scale > 1
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096 if large else 1024,
        "intermediate_size": 14336 if large else 3584,
        "num_hidden_layers": scale if large else 16,
        "num_attention_heads": 32 if large else 16,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def mixtral_tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """List the hub names and shapes of a Mixtral's tensors."""
    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, d))]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found += [(f"{at}.{norm}.weight", (d,)) for norm in ("input_layernorm", "post_attention_layernorm")]
        found += [(f"{at}.self_attn.{p}_proj.weight", (n, d)) for p, n in zip("qkvo", (d, kv, kv, d), strict=True)]
        found += [(f"{at}.block_sparse_moe.gate.weight", (config["num_local_experts"], d))]
        for e in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                found.append((f"{at}.block_sparse_moe.experts.{e}.{name}.weight", shape))
    return [*found, ("model.norm.weight", (d,)), ("lm_head.weight", (vocab, d))]


def build(folder: Path, config: dict[str, Any], *, sparse: bool) -> int:
    """Write a Mixtral in files of at most 500 MB.

    Args:
        folder: the folder to make.
        config: the model's config.
        sparse: leave the tensors as holes, which read as zeros, rather than write random bytes.

    Returns:
        The bytes of the safetensors files.
    """
    return write_folder(
        folder, config, [(name, "BF16", shape) for name, shape in mixtral_tensors(config)], sparse=sparse
    )


def write_folder(
    folder: Path, config: dict[str, Any], tensors: list[tuple[str, str, tuple[int, ...]]], *, sparse: bool = False
) -> int:
    """Write a model's tensors of random bytes, given by name, dtype and shape; the rest as of `build`."""
    folder.mkdir(parents=True)
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, kind, shape in tensors:
        size = TensorInfo(name, kind, shape).nbytes
        if groups[-1] and filled + size > MAX_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append((name, kind, shape))
        filled += size
    random = np.random.default_rng(0)
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header = encode_header(group, {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(header.raw)
            left = 0 if sparse else header.file_size - len(header.raw)
            while left:
                left -= out.write(random.bytes(min(left, 1 << 24)))
            out.truncate(header.file_size)
        weight_map.update({name: file for name, _, _ in group})
        total += header.file_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def measure(work: Path, rounds: int, *, transformers: bool) -> list[Row]:
    """Build the model and time each command, round after round.

    Raises:
        RuntimeError: a command failed, or the exported files differ from the source's.
    """
    source, copy, ckpt, other, back = (work / name for name in ("source", "copy", "ckpt", "resharded", "exported"))
    nbytes = build(source, mixtral_config(1), sparse=False)
    commands = ["import-hf", "reshard", "export-hf"]
    commands += [f"{way}-megatron {fmt}" for fmt in ("torch", "torch_dist") for way in ("export", "import")]
    names = ["cp -r", *(f"{command} --no-sync" for command in commands), "cp -r; sync", *commands, "verify"]
    rows = {name: Row(name, nbytes, prime=source) for name in names}
    for _ in range(rounds):
        rows["cp -r"].run(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        rows["cp -r; sync"].run(["sh", "-c", f"cp -r '{source}' '{copy}' && sync -f '{copy}'"])
        shutil.rmtree(copy)
        for how in (" --no-sync", ""):
            flags = how.split()
            rows[f"import-hf{how}"].run(
                [*MOECONV, "import-hf", str(source), str(ckpt), "--tp", "2", "--ep", "4", *flags]
            )
            rows[f"reshard{how}"].run(
                [*MOECONV, "reshard", str(ckpt), str(other), "--tp", "4", "--ep", "2", "--pp", "2", *flags]
            )
            shutil.rmtree(ckpt)
            rows[f"export-hf{how}"].run([*MOECONV, "export-hf", str(other), str(back), *flags])
            different = [f.name for f in source.iterdir() if not filecmp.cmp(f, back / f.name, shallow=False)]
            if different:
                raise RuntimeError(f"export-hf gave other files than the source: {', '.join(different)}")
            shutil.rmtree(back)
            if not how:
                rows["verify"].run([*MOECONV, "verify", str(other)])
            shutil.rmtree(other)
            for fmt in ("torch", "torch_dist"):
                measure_megatron(source, work, fmt, rows, how)
    if transformers:
        row = rows["transformers"] = Row("transformers load, save", nbytes)
        row.run([sys.executable, "-c", TRANSFORMERS, str(source), str(copy)])
    return list(rows.values())


def measure_megatron(source: Path, work: Path, fmt: str, rows: dict[str, Row], how: str) -> None:
    """Export a model to one of Megatron's formats and import it again.

    Raises:
        RuntimeError: a command failed, or a tensor came back with other bytes.
    """
    megatron, ckpt = work / "megatron", work / "ckpt"
    layout = ("--tp", "2", "--ep", "4")
    rows[f"export-megatron {fmt}{how}"].run(
        [*MOECONV, "export-megatron", str(source), str(megatron), "--format", fmt, *layout, *how.split()]
    )
    rows[f"import-megatron {fmt}{how}"].run([*MOECONV, "import-megatron", str(megatron), str(ckpt), *how.split()])
    shutil.rmtree(megatron)
    Row("compare", rows["cp -r"].nbytes).run([*MOECONV, "verify", str(ckpt), "--against", str(source)])
    shutil.rmtree(ckpt)


def measure_large(work: Path, scale: int) -> Row:
    """Import a sparse model of `scale` times the bytes, to show that memory stays."""
    nbytes = build(work / "large", mixtral_config(scale), sparse=True)
    row = Row(f"import-hf, {scale} times", nbytes)
    row.run([*MOECONV, "import-hf", str(work / "large"), str(work / "large-ckpt"), "--tp", "2", "--ep", "4"])
    return row


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
    parser = argparse.ArgumentParser(description="Time moeconv's conversions beside cp -r of the same files.")
    parser.add_argument(
        "--folder", type=Path, help="where to build the models (12 GB, removed again); default: a new one"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument("--scale", type=int, default=1, help="10 also imports a sparse model ten times larger (30 GB)")
    parser.add_argument("--no-transformers", action="store_true", help="leave out transformers' load and save")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeconv-bench-", dir=flags.folder) as name:
        rows = measure(Path(name), flags.rounds, transformers=not flags.no_transformers)
        if flags.scale > 1:
            rows.append(measure_large(Path(name), flags.scale))
    table = report(rows)
    if flags.json:
        print(json.dumps({"bytes": rows[0].nbytes, "cores": os.cpu_count(), "rows": table}, indent=2))
        return
    print(f"{rows[0].nbytes / 1e9:.2f} GB, {os.cpu_count()} cores, median of {flags.rounds}")
    show(table)


if __name__ == "__main__":
    main()

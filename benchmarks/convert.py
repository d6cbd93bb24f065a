"""Time the conversions beside `cp -r` of what they read: `python -m benchmarks.convert [--rounds 3] [--scale 10] [--json]`.

Builds a Mixtral of 2.9 GB (random bytes) and runs import-hf, reshard, export-hf and verify, and export-megatron and
import-megatron of both formats, as a user would, each as its own process in turns with `cp -r`, as `benchmarks/timing.py` tells:
with --no-sync beside `cp -r`, which returns before its bytes are on disk, and by default, where a conversion waits for the disk,
beside `cp -r; sync`. Prints median seconds, the median ratio of the rounds, and the highest resident memory of any process that
ran. The exported files are compared with the source's, and what came back from Megatron's formats tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import MOECONV, Row, compiled_modules, digests, in_turns, only_cached
from moeconv.io.safetensors import encode_header
from moeconv.pieces import TensorInfo

MAX_FILE_BYTES = 500_000_000
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""
LAYOUT = ("--tp", "2", "--ep", "4")
FORMATS = ("torch", "torch_dist")
COMMANDS = ("import-hf", "reshard", "export-hf", "verify", "export-megatron", "import-megatron")


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
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(partial(_write_file, folder, sparse=sparse), files, groups, range(len(files)))
        total = sum(sizes)
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name, _, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def _write_file(
    folder: Path, file: str, tensors: list[tuple[str, str, tuple[int, ...]]], seed: int, *, sparse: bool
) -> int:
    """Write one file of random bytes, other ones for each seed; give its size."""
    header = encode_header(tensors, {"format": "pt"})
    random = np.random.default_rng(seed)
    with open(folder / file, "wb") as out:
        out.write(header.raw)
        left = 0 if sparse else header.file_size - len(header.raw)
        while left:
            words = random.integers(1 << 64, size=min(left + 7 >> 3, 1 << 21), dtype=np.uint64)
            left -= out.write(words.view(np.uint8)[:left])
        out.truncate(header.file_size)
    return header.file_size


@dataclass(frozen=True, slots=True)
class Command:
    """A conversion, and what is prepared for it."""

    name: str
    reads: Path
    words: list[str]
    """With the folder that it writes as `{out}`."""
    check: Callable[[Path], None] = lambda _: None
    """Looks at what it wrote."""
    waits: bool = True
    """Whether it can wait for the disk, or not."""


class Bench:
    """Times the commands of a folder."""

    def __init__(self, work: Path, rounds: int) -> None:
        """Build the model, and what is made of it once."""
        self.work, self.rounds = work, rounds
        self.source, self.ckpt, self.other, self.out = (work / n for n in ("source", "ckpt", "resharded", "out"))
        self.nbytes = build(self.source, mixtral_config(1), sparse=False)
        self.expected = digests(self.source)
        self._once("import-hf", str(self.source), str(self.ckpt), *LAYOUT)
        self._once("reshard", str(self.ckpt), str(self.other), "--tp", "4", "--ep", "2", "--pp", "2")

    def commands(self) -> Iterator[Command]:
        """List the conversions; those of Megatron's formats read what is made when it is their turn."""
        yield Command("import-hf", self.source, ["import-hf", str(self.source), "{out}", *LAYOUT])
        words = ["reshard", str(self.ckpt), "{out}", "--tp", "4", "--ep", "2", "--pp", "2"]
        yield Command("reshard", self.ckpt, words)
        yield Command("export-hf", self.other, ["export-hf", str(self.other), "{out}"], self._same_files)
        yield Command("verify", self.other, ["verify", str(self.other)], waits=False)
        for fmt in FORMATS:
            words = ["export-megatron", str(self.source), "{out}", "--format", fmt, *LAYOUT]
            yield Command(f"export-megatron {fmt}", self.source, words)
            megatron = self.work / "megatron"
            self._once("export-megatron", str(self.source), str(megatron), "--format", fmt, *LAYOUT)
            words = ["import-megatron", str(megatron), "{out}"]
            yield Command(f"import-megatron {fmt}", megatron, words, self._same_tensors)
            shutil.rmtree(megatron)

    def measure(self, command: Command) -> dict[str, Any]:
        """Time a conversion without and with the wait for the disk, each in turns with a copy of what it reads."""
        row: dict[str, Any] = {"command": command.name}
        for how, flags, synced in (("no_sync", ["--no-sync"], False), ("default", [], True)):
            if not command.waits and synced:
                continue
            words = [word.format(out=self.out) for word in command.words] + (flags if command.waits else [])
            self._cache(command)
            row[how] = in_turns(
                f"{command.name} {' '.join(flags)}".strip(), command.reads, self.out, [*MOECONV, *words], self.nbytes,
                self.rounds, lambda: self._check(command), synced=synced,
            )  # fmt: skip
        return row

    def transformers(self) -> dict[str, Any]:
        """Time transformers' load and save once."""
        only_cached(self.source, self.ckpt, self.other)
        words = [sys.executable, "-c", TRANSFORMERS, str(self.source), str(self.out)]
        return {
            "command": "transformers load, save",
            "no_sync": in_turns("transformers", self.source, self.out, words, self.nbytes, 1),
        }

    def _once(self, *words: str) -> None:
        Row(f"{words[0]}: to begin with", self.nbytes).run([*MOECONV, *words])

    def _cache(self, command: Command) -> None:
        folders = (self.source, self.ckpt, self.other, self.work / "megatron")
        only_cached(command.reads, *(folder for folder in folders if folder != command.reads))

    def _check(self, command: Command) -> None:
        command.check(self.out)
        self._cache(command)

    def _same_files(self, out: Path) -> None:
        found = digests(out)
        if found != self.expected:
            different = [name for name in self.expected if found.get(name) != self.expected[name]]
            raise RuntimeError(f"export-hf gave other files than the source: {', '.join(different)}")

    def _same_tensors(self, out: Path) -> None:
        Row("compare", self.nbytes).run([*MOECONV, "verify", str(out), "--against", str(self.source)])


def measure_large(work: Path, scale: int) -> dict[str, Any]:
    """Import a sparse model of `scale` times the bytes, to show that memory stays."""
    nbytes = build(work / "large", mixtral_config(scale), sparse=True)
    row = Row(f"import-hf, {scale} times", nbytes)
    row.run([*MOECONV, "import-hf", str(work / "large"), str(work / "large-ckpt"), *LAYOUT])
    return {"command": row.name, "default": {"seconds": round(row.seconds[0], 2), "peak_mb": round(row.memory / 1e6)}}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table in Markdown."""
    print(
        "| command | `--no-sync`, s | `cp -r` of what it reads, s | ratio (rounds) | default, s | `cp -r; sync`, s | ratio (rounds) "
        "| peak MB |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for row in rows:
        cells = [cell for how in ("no_sync", "default") for cell in _cells(row.get(how))]
        peak = max(row[how]["peak_mb"] for how in ("no_sync", "default") if how in row)
        print(f"| {row['command']} | {' | '.join(cells)} | {peak} |")


def _cells(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    if "ratios" not in found:
        return [f"{found['seconds']:.2f}", "", ""]
    ratios = found["ratios"]
    ratio = f"{found['ratio_to_cp']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [f"{found['seconds']:.2f}", f"{found['cp_seconds']:.2f}", ratio]


def main() -> None:
    """Parse the command line, measure, print and clean up."""
    parser = argparse.ArgumentParser(description="Time moeconv's conversions beside cp -r of what they read.")
    parser.add_argument(
        "--folder", type=Path, help="where to build the models (16 GB, removed again); default: a new one"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument("--scale", type=int, default=1, help="10 also imports a sparse model ten times larger (30 GB)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS, help="some of the commands")
    parser.add_argument("--no-transformers", action="store_true", help="leave out transformers' load and save")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="moeconv-bench-", dir=flags.folder) as name,
        compiled_modules(Path(name)),
    ):
        bench = Bench(Path(name), flags.rounds)
        wanted = (c for c in bench.commands() if c.name.split()[0] in flags.only)
        rows = [bench.measure(command) for command in wanted]
        if not flags.no_transformers:
            rows.append(bench.transformers())
        if flags.scale > 1:
            rows.append(measure_large(Path(name), flags.scale))
    if flags.json:
        print(json.dumps({"bytes": bench.nbytes, "cores": os.cpu_count(), "rows": rows}, indent=2))
        return
    print(f"{bench.nbytes / 1e9:.2f} GB, {os.cpu_count()} cores, median of {flags.rounds}\n")
    show(rows)


if __name__ == "__main__":
    main()

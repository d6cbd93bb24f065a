"""Time import and export of every stored form beside `cp -r`: `python -m benchmarks.convert_forms [--rounds 5] [--gb 2.5] [--only FORM ...]`.

Sources of random bytes with true layer shapes and few layers: Mixtral 8x7B in bf16, Qwen3-30B-A3B's experts one by one, fused, and in FP8
with 128x128 block scales, and gpt-oss-20b's MXFP4 stacks.

Each beside a `cp -r` of what it reads, as `benchmarks/timing.py` tells; nothing waits for the disk (--no-sync, as `cp`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convert import write_folder
from benchmarks.timing import MOECONV, Row, compiled_modules, digests, in_turns, only_cached
from moeconv.checkpoint import model_of
from moeconv.families.base import GlobalTensor, Model
from moeconv.forms import Names, written
from moeconv.pieces import TensorInfo

_QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@dataclass(frozen=True, slots=True)
class Form:
    """A source: its config without layers, the names of its experts, and what begins the roles of quantised weights."""

    config: dict[str, Any]
    names: Names = "hub"
    quantised: tuple[str, ...] = ()


FORMS = {
    "Mixtral, bf16": Form(
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        }
    ),
    "Qwen3-30B, bf16": Form(_QWEN),
    "Qwen3-30B, fused": Form(_QWEN, "fused"),
    "Qwen3-30B, FP8 blocks": Form(_QWEN | {"quantization_config": _FP8}, quantised=("expert.", "attention.q", "attention.o")),
    "gpt-oss-20b, MXFP4": Form(
        {
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
            "quantization_config": {"quant_method": "mxfp4"},
        },
        quantised=("expert.gate_up", "expert.down"),
    ),
}  # fmt: skip


def stored(form: Form, layers: int) -> tuple[dict[str, Any], list[tuple[str, str, tuple[int, ...]]]]:
    """Give a source's config, and name, dtype and shape of each tensor in its files."""
    config = form.config | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    model = model_of(config, "config")
    chosen = (
        [t.name for t in model.plain.values() if t.rule.role.startswith(form.quantised) and len(t.shape) == 2]
        if form.quantised
        else []
    )
    model = model.stored_as(chosen, {})
    tensors = {
        t.name: TensorInfo(t.name, _kind(model, t), t.shape) for t in model.tensors.values() if not model.optional(t)
    }
    return config, [(w.info.name, w.info.dtype, w.info.shape) for w in written(model, tensors, tensors, form.names)]


def _kind(model: Model, tensor: GlobalTensor) -> str:
    if tensor.part is None or model.scheme is None:
        return "BF16"
    mxfp4 = model.scheme.name == "MXFP4"
    return "U8" if mxfp4 else "F8_E4M3" if tensor.part.role == "weight" else "F32"


def measure(work: Path, name: str, form: Form, gigabytes: float, rounds: int) -> list[dict[str, Any]]:
    """Time one source, in both directions.

    Raises:
        RuntimeError: a command failed, or the exported files differ from the source's.
    """
    source, ckpt, out = (work / folder for folder in ("source", "ckpt", "out"))
    layers, config, tensors = 0, dict[str, Any](), list[tuple[str, str, tuple[int, ...]]]()
    size = 0
    while size < gigabytes * 1e9:
        layers += 1
        config, tensors = stored(form, layers)
        size = sum(TensorInfo(*tensor).nbytes for tensor in tensors)
    nbytes = write_folder(source, config, tensors)
    expected = digests(source)
    load = [*MOECONV, "import-hf", str(source)]
    layout = ["--tp", "2", "--ep", "4", "--no-sync"]
    Row(f"{name}: for the export", nbytes).run([*load, str(ckpt), *layout])

    def check() -> None:
        if digests(out) != expected:
            raise RuntimeError(f"{name}: export-hf gave other files than the source")

    only_cached(source, ckpt)
    imported = in_turns(f"{name}: import-hf", source, out, [*load, str(out), *layout], nbytes, rounds)
    only_cached(ckpt, source)
    save = [*MOECONV, "export-hf", str(ckpt), str(out), "--no-sync"]
    exported = in_turns(f"{name}: export-hf", ckpt, out, save, nbytes, rounds, check)
    shutil.rmtree(source)
    shutil.rmtree(ckpt)
    form_of = {"form": name, "gb": round(nbytes / 1e9, 2), "tensors": len(tensors)}
    return [form_of | {"command": c} | row for c, row in (("import-hf", imported), ("export-hf", exported))]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Time import and export of every stored form beside cp -r.")
    parser.add_argument("--folder", type=Path, help="where to build the sources; default: a new one, removed again")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command; the median counts")
    parser.add_argument("--gb", type=float, default=2.5, help="least size of a source")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS), help="some of the sources")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args()
    table = list[dict[str, Any]]()
    with (
        tempfile.TemporaryDirectory(prefix="moeconv-bench-", dir=flags.folder) as name,
        compiled_modules(Path(name)),
    ):
        for form in flags.only:
            table += measure(Path(name), form, FORMS[form], flags.gb, flags.rounds)
    if flags.json:
        print(json.dumps(table, indent=2))
        return
    print(
        "| source | GB | tensors | command | seconds | `cp -r` | ratio (rounds) | CPU s/GB | `cp`, CPU s/GB | peak MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in table:
        print(
            f"| {row['form']} | {row['gb']:.2f} | {row['tensors']} | {row['command']} | {row['seconds']:.2f} | {row['cp_seconds']:.2f} "
            f"| {row['ratio_to_cp']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}) | {row['processor_seconds_per_gb']:.2f} "
            f"| {row['cp_processor_seconds_per_gb']:.2f} | {row['peak_mb']} |"
        )


if __name__ == "__main__":
    main()

"""Time import and export of every stored form beside `cp -r` of the same bytes: `python -m benchmarks.convert_forms [--rounds 3] [--gb 1.5]`.

Sources of random bytes with true layer shapes and few layers: Mixtral 8x7B in bf16, Qwen3-30B-A3B's experts one by one, fused, and in FP8
with 128x128 block scales, and gpt-oss-20b's MXFP4 stacks. Like for like: nothing waits for the disk (--no-sync, as `cp`). Processor
seconds are those of the command and what it started, and hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convert import MOECONV, Row, write_folder
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


def measure(work: Path, name: str, form: Form, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Time one source.

    Raises:
        RuntimeError: a command failed, or the exported files differ from the source's.
    """
    source, copy, ckpt, back = (work / folder for folder in ("source", "copy", "ckpt", "back"))
    layers, config, tensors = 0, dict[str, Any](), list[tuple[str, str, tuple[int, ...]]]()
    size = 0
    while size < gigabytes * 1e9:
        layers += 1
        config, tensors = stored(form, layers)
        size = sum(TensorInfo(*tensor).nbytes for tensor in tensors)
    nbytes = write_folder(source, config, tensors)
    rows = {key: Row(f"{name}: {key}", nbytes, prime=source) for key in ("cp -r", "import-hf", "export-hf")}
    for _ in range(rounds):
        rows["cp -r"].run(["cp", "-r", str(source), str(copy)])
        shutil.rmtree(copy)
        rows["import-hf"].run([*MOECONV, "import-hf", str(source), str(ckpt), "--tp", "2", "--ep", "4", "--no-sync"])
        rows["export-hf"].run([*MOECONV, "export-hf", str(ckpt), str(back), "--no-sync"])
        different = [f.name for f in source.iterdir() if not filecmp.cmp(f, back / f.name, shallow=False)]
        if different:
            raise RuntimeError(f"{name}: export-hf gave other files than the source: {', '.join(different)}")
        shutil.rmtree(ckpt)
        shutil.rmtree(back)
    shutil.rmtree(source)
    base = statistics.median(rows["cp -r"].seconds)
    out: dict[str, Any] = {
        "form": name,
        "gb": round(nbytes / 1e9, 2),
        "tensors": len(tensors),
        "cp_seconds": round(base, 2),
    }
    for key in ("import-hf", "export-hf"):
        row = rows[key]
        out[key] = {
            "seconds": round(statistics.median(row.seconds), 2),
            "ratio_to_cp": round(statistics.median(row.seconds) / base, 2),
            "processor_seconds_per_gb": round(statistics.median(row.processor) / nbytes * 1e9, 2),
            "peak_mb": round(row.memory / 1e6),
        }
    return out


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Time import and export of every stored form beside cp -r.")
    parser.add_argument("--folder", type=Path, help="where to build the sources; default: a new one, removed again")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command; the median counts")
    parser.add_argument("--gb", type=float, default=1.5, help="least size of a source")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moeconv-bench-", dir=flags.folder) as name:
        table = [measure(Path(name), form, FORMS[form], flags.gb, flags.rounds) for form in FORMS]
    if flags.json:
        print(json.dumps(table, indent=2))
        return
    print(
        f"{'source':<24} {'GB':>5} {'tensors':>8} {'command':<10} {'seconds':>8} {'to cp':>6} {'cpu s/GB':>9} {'peak MB':>8}"
    )
    for row in table:
        for key in ("import-hf", "export-hf"):
            cell = row[key]
            print(
                f"{row['form']:<24} {row['gb']:5.2f} {row['tensors']:8} {key:<10} {cell['seconds']:8.2f} {cell['ratio_to_cp']:5.2f}x "
                f"{cell['processor_seconds_per_gb']:9.2f} {cell['peak_mb']:8}"
            )


if __name__ == "__main__":
    main()

"""Hugging Face to Megatron and back, for every format, spec and kind of layout: the same bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf
from moeconv.errors import LayoutError
from moeconv.layout.degrees import Degrees
from moeconv.megatron.convert import export_megatron, import_megatron, open_megatron
from tests.megatron.conftest import assert_same, make_model

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp": 2, "ep": 2},
    {"tp": 2, "pp": 2, "ep": 2},
    {"tp": 4, "pp": 4, "ep": 8, "etp": 1},  # more tensor ranks than key/value heads
    {"pp": 2, "vpp": 2},
    {"tp": 2, "ep": 2, "etp": 1},  # two files where tp x ep would be four
    {"tp": 4, "ep": 2, "etp": 2},
    {"pp": 3, "pp_layers": (1, 2, 1)},
]
SPECS = [("te", "grouped"), ("te", "sequential"), ("local", "sequential")]


def export(src: Path, out: Path, fmt: Any, layout: dict[str, Any], spec: Any = "te", experts: Any = "grouped") -> Path:
    options = Options()
    export_megatron(src, out, fmt=fmt, degrees=Degrees(**layout), spec=spec, experts=experts, options=options)
    return out


def bring_back(src: Path, out: Path, **options: Any) -> Path:
    """Import a Megatron checkpoint under another layout, and write it as a Hugging Face folder."""
    shards = out.with_name(out.name + "-shards")
    import_megatron(open_megatron(src, **options), shards, Degrees(tp=2, pp=2, ep=4), Options())
    write_hf(open_checkpoint(shards), out, None, Options())
    return out


@pytest.mark.parametrize(("fmt", "layout"), list(itertools.product(["torch", "torch_dist"], LAYOUTS)), ids=str)
def test_round_trip(hf_bf16: Path, tmp_path: Path, fmt: str, layout: dict[str, Any]) -> None:
    for spec, experts in SPECS:
        folder = tmp_path / f"{spec}-{experts}"
        folder.mkdir()
        export(hf_bf16, folder / "megatron", fmt, layout, spec, experts)
        source = open_megatron(folder / "megatron")
        expected = Degrees(**{k: v for k, v in layout.items() if k != "pp_layers" or fmt == "torch"})
        assert (source.fmt, source.spec, source.degrees) == (fmt, spec, expected)
        bring_back(folder / "megatron", folder / "hf")
        assert_same(folder / "hf", hf_bf16)
        assert (folder / "hf/config.json").read_bytes() == (hf_bf16 / "config.json").read_bytes()


def test_degrees_of_the_torch_format_that_share_a_file(hf_bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="an etp that divides tp, or --format torch_dist"):
        export(hf_bf16, tmp_path / "out", "torch", {"tp": 1, "etp": 2})
    export(hf_bf16, tmp_path / "dist", "torch_dist", {"tp": 1, "etp": 2})
    assert_same(bring_back(tmp_path / "dist", tmp_path / "hf"), hf_bf16)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    src = make_model(tmp_path / "hf", dtype, num_hidden_layers=2)
    for fmt in ("torch", "torch_dist"):
        export(src, tmp_path / fmt, fmt, {"tp": 2, "ep": 2})
        assert_same(bring_back(tmp_path / fmt, tmp_path / f"{fmt}-hf"), src)


def test_tied_embeddings_with_a_pipeline(tmp_path: Path) -> None:
    src = make_model(tmp_path / "hf", torch.bfloat16, tie_word_embeddings=True)
    for fmt in ("torch", "torch_dist"):
        export(src, tmp_path / fmt, fmt, {"tp": 2, "pp": 2})
        assert_same(bring_back(tmp_path / fmt, tmp_path / f"{fmt}-hf"), src)
    last = torch.load(tmp_path / "torch/release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)
    assert last["model"]["output_layer.weight"].shape == (128, 16)


def test_config_from_args_alone(hf_bf16: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    export(hf_bf16, tmp_path / "megatron", "torch_dist", {"tp": 2})
    (tmp_path / "megatron/config.json").unlink()
    bring_back(tmp_path / "megatron", tmp_path / "hf")
    made = json.loads((tmp_path / "hf/config.json").read_text())
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
    same += ["num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "tie_word_embeddings"]
    same += ["max_position_embeddings", "sliding_window", "model_type", "architectures"]
    assert {k: made[k] for k in same} == {k: config[k] for k in same}
    assert made["rope_theta"] == 1e6
    assert made["torch_dtype"] == "bfloat16"
    from transformers import AutoModelForCausalLM

    left = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    right = AutoModelForCausalLM.from_pretrained(hf_bf16)
    tokens = torch.arange(20)[None]
    assert torch.equal(left(tokens).logits, right(tokens).logits)


def test_without_args_the_files_tell_the_layout(hf_bf16: Path, tmp_path: Path) -> None:
    """mp_rank_00_001 is a pipeline stage or an expert rank; a converter's files may lack args to say which."""
    for number, layout in enumerate([{"pp": 2}, {"ep": 2}, {"tp": 2, "pp": 2, "ep": 2}]):
        out = export(hf_bf16, tmp_path / f"m{number}", "torch", layout)
        for path in out.rglob("*.pt"):
            state = torch.load(path, weights_only=False)
            del state["args"]
            torch.save(state, path)
        assert_same(bring_back(out, tmp_path / f"h{number}", hf_config=hf_bf16), hf_bf16)


def test_the_same_bytes_for_any_number_of_workers(hf_bf16: Path, tmp_path: Path) -> None:
    for fmt in ("torch", "torch_dist"):
        for workers in (1, 5):
            export_megatron(
                hf_bf16,
                tmp_path / f"{fmt}{workers}",
                fmt=fmt,  # type: ignore[arg-type]
                degrees=Degrees(tp=2, ep=4),
                spec="te",
                experts="grouped",
                options=Options(workers=workers),
            )
        left, right = (sorted(p for p in (tmp_path / f"{fmt}{w}").rglob("*") if p.is_file()) for w in (1, 5))
        assert [p.name for p in left] == [p.name for p in right]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(left, right, strict=True))

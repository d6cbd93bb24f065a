"""Quantised weights: their bytes through every layout and back, cuts along blocks alone, and casts that are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.describe import describe
from moeconv.errors import LayoutError, MappingError
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.quant.cast import cast
from tests.moeconv.models import digests
from tests.moeconv.quantised import FORMS, mxfp4_folder, quantise_folder

WIDE: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 128, "intermediate_size": 384}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "head_dim": 64, "num_nextn_predict_layers": 1,
}  # fmt: skip
OSS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
LAYOUTS = (
    Degrees(tp=2, ep=2, etp=2, pp=2),
    Degrees(ep=4, etp=1),
    Degrees(tp=2, etp=1, pp=2),
)


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def expert(name: str) -> bool:
    return ".experts." in name


def there_and_back(source: Path, root: Path, layouts: tuple[Degrees, ...] = LAYOUTS) -> None:
    """Import, reshard and export; every file must come back."""
    path = source
    for number, degrees in enumerate(layouts):
        write_sharded(open_checkpoint(path), root / str(number), degrees, Options())
        path = root / str(number)
    write_hf(open_checkpoint(path), root / "back", None, Options())
    assert digests(root / "back") == digests(source)


def test_deepseek_fp8_with_a_further_layer(tmp_path: Path) -> None:
    """Layer 2 predicts a further token: it goes along byte for byte, its own quantised weights too."""
    further = {
        "model.layers.2.eh_proj.weight": torch.randn(256, 512).to(torch.float8_e4m3fn),
        "model.layers.2.eh_proj.weight_scale_inv": torch.rand(2, 4),
        "model.layers.2.enorm.weight": torch.randn(256).to(torch.bfloat16),
    }
    source = quantise_folder(tmp_path / "hf", "deepseek_v3", "fp8", linear, further, **DEEPSEEK)
    there_and_back(source, tmp_path)
    shards = open_checkpoint(tmp_path / "0")
    assert set(shards.model.carried) == set(further)
    assert {p.file for name in further for p in shards.pieces[name]} == {"carried-pp1.safetensors"}
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    weight, scale = (shards.pieces[n] for n in (name, name + "_scale_inv"))
    assert [p.rect for p in weight] == [Rect((0, 0), (256, 128)), Rect((0, 128), (256, 128))]
    assert [p.rect for p in scale] == [Rect((0, 0), (2, 1)), Rect((0, 1), (2, 1))]
    assert [p.file for p in weight] == [p.file for p in scale]
    counts = describe(shards)
    assert counts["parameters"] == sum(t.parameters for t in shards.model.plain.values())


@pytest.mark.parametrize("form", FORMS)
def test_bytes_come_back(form: str, tmp_path: Path) -> None:
    chosen = linear if form.startswith("fp8") else expert
    there_and_back(quantise_folder(tmp_path / "hf", "qwen3_moe", form, chosen, **WIDE), tmp_path)


def test_mxfp4_comes_back(tmp_path: Path) -> None:
    layouts = (Degrees(tp=2, ep=2, etp=3, pp=2), Degrees(ep=4, etp=1), Degrees(etp=3))
    there_and_back(mxfp4_folder(tmp_path / "hf", **OSS), tmp_path, layouts)
    name = "model.layers.0.mlp.experts.1.down_proj_blocks"
    rects = [p.rect for p in open_checkpoint(tmp_path / "0").pieces[name]]
    assert rects == [Rect((0, n, 0), (64, 1, 16)) for n in range(3)]


def test_a_cut_through_a_block_is_refused_with_what_fits(tmp_path: Path) -> None:
    source = open_checkpoint(mxfp4_folder(tmp_path / "hf", **OSS))
    with pytest.raises(LayoutError, match=r"MXFP4.*blocks of 32.*degrees that fit: 1, 3.*--dtype bfloat16"):
        write_sharded(source, tmp_path / "out", Degrees(etp=2), Options())
    assert not (tmp_path / "out").exists()
    source = open_checkpoint(quantise_folder(tmp_path / "qwen", "qwen3_moe", "fp8", linear, **WIDE))
    with pytest.raises(LayoutError, match=r"128x128.*degrees that fit: 1, 2"):
        write_sharded(source, tmp_path / "out", Degrees(etp=4), Options())
    source = open_checkpoint(quantise_folder(tmp_path / "small", "qwen3_moe", "fp8", linear, **WIDE | {"head_dim": 64}))
    with pytest.raises(LayoutError, match=r"k_proj.*128x128.*degrees that fit: 1\."):
        write_sharded(source, tmp_path / "out", Degrees(tp=2, etp=1), Options())


def test_a_scale_that_is_missing_is_named(tmp_path: Path) -> None:
    source = quantise_folder(tmp_path / "hf", "qwen3_moe", "compressed-tensors int4", expert, **WIDE)
    from safetensors.torch import save_file

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight_scale"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MappingError, match=r"lacks .*experts\.1\.up_proj\.weight_scale"):
        open_checkpoint(source)


def cast_back(source: Checkpoint, dtype: str, root: Path) -> Path:
    """Cast at an import into shards, export, and give the folder."""
    write_sharded(cast(source, dtype), root / "shards", Degrees(tp=2, ep=2, etp=1), Options())
    write_hf(open_checkpoint(root / "shards"), root / "plain", None, Options())
    return root / "plain"


def test_mxfp4_to_bf16_is_transformers_own(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = open_checkpoint(mxfp4_folder(tmp_path / "hf", **OSS))
    plan = cast(source, "bfloat16")
    assert "exactly" in plan.notes[0]
    got = load_file(cast_back(source, "bfloat16", tmp_path) / "model.safetensors")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in got.items():
        if name + "_blocks" in stored:
            want = convert_moe_packed_tensors(stored[name + "_blocks"], stored[name + "_scales"])
            assert torch.equal(tensor.view(torch.int16), want.view(torch.int16)), name
        else:
            assert torch.equal(tensor, stored[name])
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("form", ["fp8", "fp8 exponents"])
def test_fp8_to_bf16_is_transformers_own(form: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    source = open_checkpoint(quantise_folder(tmp_path / "hf", "qwen3_moe", form, linear, **WIDE))
    assert ("exactly" in cast(source, "bfloat16").notes[0]) == (form == "fp8 exponents")
    got = load_file(cast_back(source, "bfloat16", tmp_path) / "model.safetensors")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    compared = 0
    for name, tensor in got.items():
        scale = stored.get(name.replace(".weight", ".weight_scale_inv"))
        if scale is None:
            assert torch.equal(tensor, stored[name])
            continue
        want = Fp8Dequantize(None)._dequantize_one(stored[name], scale, torch.bfloat16)
        assert torch.equal(tensor, want), name
        compared += 1
    assert compared > 10


def test_bf16_to_fp8_is_transformers_own(tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    from tests.upcycle.hub import make_folder

    source = open_checkpoint(make_folder(tmp_path / "hf", "qwen3_moe", torch.bfloat16, **WIDE))
    folder = cast_back(source, "fp8", tmp_path)
    got = load_file(folder / "model.safetensors")
    quantizer: Any = type("Quantizer", (), {"quantization_config": FineGrainedFP8Config()})()
    compared = 0
    for name in source.tensors:
        scale = name.replace(".weight", ".weight_scale_inv")
        plain = torch.from_numpy(source.read(name).astype("float32")).to(torch.bfloat16)
        if scale not in got:
            assert torch.equal(got[name], plain)
            continue
        want = Fp8Quantize(quantizer)._quantize_one(name, plain)
        assert torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)), name
        assert torch.equal(got[scale], want[scale]), name
        compared += 1
    assert compared > 10
    # And back: what transformers would read of it.
    again = open_checkpoint(folder)
    assert again.model.quantised
    (tmp_path / "again").mkdir()
    there_and_back(folder, tmp_path / "again", (Degrees(tp=2, ep=2),))


def test_casts_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    from tests.upcycle.hub import make_folder

    plain = open_checkpoint(make_folder(tmp_path / "hf", "qwen3_moe", torch.bfloat16))
    with pytest.raises(MappingError, match="holds no quantised weights but BF16"):
        cast(plain, "bfloat16")
    packed = open_checkpoint(quantise_folder(tmp_path / "awq", "qwen3_moe", "awq", expert, **WIDE))
    for dtype, message in (("bfloat16", "no cast of AWQ"), ("fp8", "AWQ int4 in groups of 32 already")):
        with pytest.raises(MappingError, match=message):
            cast(packed, dtype)


def test_who_needs_plain_weights_says_how_to_get_them(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from cli.main import main

    shards = tmp_path / "shards"
    source = open_checkpoint(quantise_folder(tmp_path / "hf", "qwen3", "fp8", linear, **WIDE))
    write_sharded(source, shards, Degrees(), Options())
    shown = CliRunner().invoke(main, ["inspect", str(shards)])
    assert "14 weights as FP8 with 128x128 block scales" in shown.output
    for arguments in (
        ["upcycle", str(tmp_path / "hf"), str(tmp_path / "out"), "--experts", "4"],
        ["export-megatron", str(shards), str(tmp_path / "out"), "--format", "torch_dist"],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code != 0
        assert "--dtype bfloat16" in done.output, done.output
        assert not (tmp_path / "out").exists()

"""Quantised weights: their bytes through every layout and back, cuts along blocks alone, and casts that are transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.describe import describe
from moeconv.errors import LayoutError, MappingError
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.quant.cast import cast
from tests.moeconv.families.test_wrapped import make_folder as make_wrapped
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


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"gptq by activation"}))  # of which no rows can be cut
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


def told_by_compressed_tensors(stored: dict[str, torch.Tensor], base: str, config: dict[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    parts = {name.removeprefix(base): tensor for name, tensor in stored.items() if name.startswith(base)}
    found = BaseCompressor.get_value_from_registry(config["format"]).decompress(parts, scheme)
    return found["weight"]


def told_by_modelopt(stored: dict[str, torch.Tensor], base: str, config: dict[str, Any]) -> torch.Tensor:
    """Each number times its group's scale, itself times the whole weight's."""
    packed = stored[base + "weight"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    numbers = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(1)
    scales = stored[base + "weight_scale"].float() * stored[base + "weight_scale_2"].float()
    return (numbers.unflatten(1, (-1, 16)) * scales[..., None]).flatten(1).to(torch.bfloat16)


def told_by_gptq(stored: dict[str, torch.Tensor], base: str, config: dict[str, Any]) -> torch.Tensor:
    """Element (i, o) of [in, out]: scale of its group times (number - zero), where version 1 stores zeros less one."""
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    shifts = torch.arange(0, 32, 4)
    numbers = (stored[base + "qweight"].unsqueeze(1) >> shifts[None, :, None] & 15).flatten(0, 1)
    zeros = (stored[base + "qzeros"].unsqueeze(2) >> shifts & 15).flatten(1) + less & 15
    group = stored[base + "g_idx"].long()
    return (stored[base + "scales"][group] * (numbers - zeros[group]).half()).T.to(torch.bfloat16)


def told_by_awq(stored: dict[str, torch.Tensor], base: str, config: dict[str, Any]) -> torch.Tensor:
    """As AutoAWQ's dequantize_gemm: unpack in turn, then reorder the columns of each word."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def apart(words: torch.Tensor) -> torch.Tensor:
        return (words.unsqueeze(2) >> torch.arange(0, 32, 4) & 15)[:, :, order].flatten(1)

    numbers, zeros = apart(stored[base + "qweight"]), apart(stored[base + "qzeros"])
    scales = stored[base + "scales"].repeat_interleave(32, 0)
    return ((numbers - zeros.repeat_interleave(32, 0)).half() * scales).T.to(torch.bfloat16)


MAKERS: dict[str, Callable[[dict[str, torch.Tensor], str, dict[str, Any]], torch.Tensor]] = {
    "nvfp4": told_by_modelopt,
    "compressed-tensors nvfp4": told_by_compressed_tensors,
    "compressed-tensors int4": told_by_compressed_tensors,
    "compressed-tensors int4 zeros": told_by_compressed_tensors,
    "gptq": told_by_gptq,
    "gptq by activation": told_by_gptq,
    "gptq_v2": told_by_gptq,
    "awq": told_by_awq,
}


@pytest.mark.parametrize("form", MAKERS)
def test_packed_numbers_to_bf16_are_their_makers_own(form: str, tmp_path: Path) -> None:
    source = open_checkpoint(quantise_folder(tmp_path / "hf", "qwen3_moe", form, expert, **WIDE, num_hidden_layers=1))
    got = load_file(cast_back(source, "bfloat16", tmp_path) / "model.safetensors")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert "rounded as their maker's" in cast(source, "bfloat16").notes[0]
    assert source.model.quantised
    for name in source.model.quantised:
        want = MAKERS[form](stored, name.removesuffix("weight"), FORMS[form][0])
        assert torch.equal(got[name].nan_to_num(1e4), want.nan_to_num(1e4)), name
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_weights_of_further_layers_are_cast_too(tmp_path: Path) -> None:
    """They go along unread, but no reader could make sense of FP8 in a folder whose config says bfloat16."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    name = "model.layers.2.eh_proj.weight"
    further = {
        name: torch.randn(256, 512).to(torch.float8_e4m3fn),
        name + "_scale_inv": torch.rand(2, 4),
        "model.layers.2.enorm.weight": torch.randn(256).to(torch.bfloat16),
    }
    source = open_checkpoint(quantise_folder(tmp_path / "hf", "deepseek_v3", "fp8", linear, further, **DEEPSEEK))
    got = load_file(cast_back(source, "bfloat16", tmp_path) / "model.safetensors")
    assert not any(name.endswith("_scale_inv") for name in got)
    want = Fp8Dequantize(None)._dequantize_one(further[name], further[name + "_scale_inv"], torch.bfloat16)
    assert torch.equal(got[name], want)
    assert torch.equal(got["model.layers.2.enorm.weight"], further["model.layers.2.enorm.weight"])


@pytest.mark.parametrize("place", ["text_config", ""], ids=["inside", "at the top"])
def test_a_config_with_the_quantisation_of_its_language_model(place: str, tmp_path: Path) -> None:
    """Kimi-K2.5 says how its language model's experts are packed inside text_config."""
    folder = make_wrapped(tmp_path / "hf", "kimi_k25")
    config_said, quantise = FORMS["compressed-tensors int4"]
    config_said = json.loads(json.dumps(config_said).replace('"group_size": 32', '"group_size": 16'))
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".experts." in name and ".shared" not in name:
            found = quantise(name, weight, generator)
            scale = name + "_scale"
            tensors |= found | {
                scale: torch.rand(weight.shape[0], weight.shape[1] // 16, generator=generator).bfloat16()
            }
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (config[place] if place else config)["quantization_config"] = config_said
    config["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(folder)
    assert len(source.model.quantised) == 12
    there_and_back(folder, tmp_path, (Degrees(ep=2, etp=1),))
    plain = cast_back(source, "float32", tmp_path)
    said = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in json.dumps(said)
    assert said["text_config"]["dtype"] == said["dtype"] == "float32"
    assert said["vision_config"] == config["vision_config"]
    again = open_checkpoint(plain)
    assert again.model.compute == open_checkpoint(tmp_path / "shards").model.compute
    assert again.model.config["hidden_size"] == 32


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
    packed = quantise_folder(tmp_path / "awq", "qwen3_moe", "awq", expert, **WIDE)
    with pytest.raises(MappingError, match="AWQ int4 in groups of 32 already"):
        cast(open_checkpoint(packed), "fp8")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(MappingError, match="'gemv', which packs numbers in another order; gemm can be cast"):
        cast(open_checkpoint(packed), "bfloat16")


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

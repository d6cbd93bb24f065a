"""Tiny quantised folders: a transformers model's files with some weights replaced by random bytes of a quantised form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.upcycle.hub import make_model

Tensors = dict[str, torch.Tensor]
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def random(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes as any type."""
    count = torch.empty(shape, dtype=dtype).nbytes
    data = torch.randint(256, (max(count, 1),), generator=generator, dtype=torch.uint8)[:count]
    return data.view(dtype).reshape(shape)


def fp8(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = (-(-n // 128) for n in w.shape)
    scale = name.replace(".weight", ".weight_scale_inv")
    return {
        name: (torch.randn(w.shape, generator=g) * 50).to(torch.float8_e4m3fn),
        scale: torch.rand(rows, columns, generator=g) * 0.01 + 0.001,
    }


def fp8_exponents(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    found = fp8(name, w, g)
    scale = name.replace(".weight", ".weight_scale_inv")
    exponents = torch.randint(110, 130, found[scale].shape, generator=g, dtype=torch.uint8)
    return found | {scale: exponents.view(torch.float8_e8m0fnu)}


def nvfp4(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = w.shape
    base = name.removesuffix("weight")
    return {
        base + "weight": random(g, (rows, columns // 2), torch.uint8),
        base + "weight_scale": random(g, (rows, columns // 16), torch.float8_e4m3fn),
        base + "weight_scale_2": torch.tensor(0.5),
        base + "input_scale": torch.tensor(0.25),
    }


def nvfp4_packed(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    """As compressed-tensors writes it: the whole weight's scale is what numbers were multiplied with."""
    found, base = nvfp4(name, w, g), name.removesuffix("weight")
    whole = torch.rand(1, generator=g) * 1000 + 1
    return {
        base + "weight_packed": found[base + "weight"],
        base + "weight_scale": (torch.rand(w.shape[0], w.shape[1] // 16, generator=g) * 448).to(torch.float8_e4m3fn),
        base + "weight_global_scale": whole,
    }


def packed_int4_zeros(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = w.shape
    base = name.removesuffix("weight")
    return packed_int4(name, w, g) | {
        base + "weight_scale": torch.randn(rows, columns // 32, generator=g).to(torch.bfloat16),
        base + "weight_zero_point": random(g, (rows // 8, columns // 32), torch.int32),
    }


def packed_int4(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = w.shape
    base = name.removesuffix("weight")
    return {
        base + "weight_packed": random(g, (rows, columns // 8), torch.int32),
        base + "weight_scale": torch.randn(rows, columns // 32, generator=g).to(torch.bfloat16),
        base + "weight_shape": torch.tensor([rows, columns]),
    }


def gptq(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = w.shape
    base = name.removesuffix("weight")
    return {
        base + "qweight": random(g, (columns // 8, rows), torch.int32),
        base + "qzeros": random(g, (columns // 32, rows // 8), torch.int32),
        base + "scales": torch.randn(columns // 32, rows, generator=g).to(torch.float16),
        base + "g_idx": torch.arange(columns, dtype=torch.int32) // 32,
    }


def awq(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    rows, columns = w.shape
    base = name.removesuffix("weight")
    return {
        base + "qweight": random(g, (columns, rows // 8), torch.int32),
        base + "qzeros": random(g, (columns // 32, rows // 8), torch.int32),
        base + "scales": torch.randn(columns // 32, rows, generator=g).to(torch.float16),
    }


def gptq_by_activation(name: str, w: torch.Tensor, g: torch.Generator) -> Tensors:
    """Any input may belong to any group."""
    base = name.removesuffix("weight")
    order = torch.randperm(w.shape[1], generator=g).to(torch.int32) // 32
    return gptq(name, w, g) | {base + "g_idx": order}


def _packed(**weights: Any) -> dict[str, Any]:
    """The config of compressed-tensors' packed integers."""
    said = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": said}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


FORMS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor, torch.Generator], Tensors]]] = {
    "fp8": (FP8_CONFIG, fp8),
    "fp8 exponents": (FP8_CONFIG | {"scale_fmt": "ue8m0"}, fp8_exponents),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "compressed-tensors nvfp4": (
        _packed(type="float", strategy="tensor_group", group_size=16) | {"format": "nvfp4-pack-quantized"},
        nvfp4_packed,
    ),
    "compressed-tensors int4": (_packed(), packed_int4),
    "compressed-tensors int4 zeros": (_packed(symmetric=False), packed_int4_zeros),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq),
    "gptq by activation": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq_by_activation),
    "gptq_v2": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq),
}


def quantise_folder(
    folder: Path,
    model_type: str,
    form: str,
    chosen: Callable[[str], bool],
    more: Tensors | None = None,
    **options: Any,
) -> Path:
    """Write a folder with some weights quantised.

    Args:
        folder: where to.
        model_type: the family.
        form: the key of FORMS.
        chosen: which weights are quantised, by name.
        more: tensors besides.
        **options: fields of the config.

    Returns:
        The folder.
    """
    config, quantise = FORMS[form]
    make_model(model_type, **options).to(torch.bfloat16).save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors |= quantise(name, weight, generator) if chosen(name) else {name: weight}
    save_file(tensors | (more or {}), folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    return folder


def mxfp4_folder(folder: Path, **options: Any) -> Path:
    """Write a gpt-oss folder whose experts are MXFP4 of random bytes, as published."""
    make_model("gpt_oss", **options).to(torch.bfloat16).save_pretrained(folder)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = weight.shape
            tensors[name + "_blocks"] = random(generator, (experts, outer, inner // 32, 16), torch.uint8)
            exponents = np.random.default_rng(0).integers(100, 135, (experts, outer, inner // 32), np.uint8)
            tensors[name + "_scales"] = torch.from_numpy(exponents)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder

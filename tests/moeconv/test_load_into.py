"""`Checkpoint.load_into`: modules of others hold what transformers loads, or are as they were and the error says what doesn't fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

import moeconv
from tests.support.modules import module_of
from tests.upcycle.hub import make_folder, make_model

DEGREES = moeconv.Degrees(tp=2, pp=2, ep=2, etp=1)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("fill") / "hf", "mixtral", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def sharded(mixtral: Path) -> moeconv.Checkpoint:
    return moeconv.import_hf(mixtral, mixtral.parent / "ckpt", moeconv.Degrees(tp=2, ep=4, etp=1)).open()


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "deepseek_v3", "llama"])
def test_a_model_of_transformers_holds_what_transformers_loads(tmp_path: Path, family: str) -> None:
    dtype = torch.bfloat16 if family == "deepseek_v3" else torch.float32
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    folder = make_folder(tmp_path / "hf", family, dtype, **tied)
    model = make_model(family, seed=1, **tied).to(dtype)
    moeconv.import_hf(folder, tmp_path / "ckpt").open().load_into(model)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_a_rank_of_a_trainer_of_one_s_own(mixtral: Path, sharded: moeconv.Checkpoint) -> None:
    """Names of its own, its own layout, layers counted within the stage; all ranks together are the model."""
    whole = {name: sharded.tensor(name).torch() for name in sharded.tensors}
    seen: dict[str, torch.Tensor] = {name: torch.full_like(value, float("nan")) for name, value in whole.items()}
    for tp, pp, ep in ((t, p, e) for t in range(2) for p in range(2) for e in range(2)):
        rank = {"tp": tp, "pp": pp, "ep": ep}
        parts = moeconv.open(mixtral).rank(DEGREES, **rank)
        own = {name: name.replace(f"model.layers.{pp}.", "blocks.0.").replace("self_attn", "attn") for name in parts}
        module = module_of({own[name]: part.shape for name, part in parts.items()})
        hub = {mine: name for name, mine in own.items()}
        assert sharded.load_into(module, degrees=DEGREES, rank=rank, names=hub) > 0
        for name, part in parts.items():
            filled = module.get_parameter(own[name]).detach()
            assert torch.equal(filled, whole[name][part.rect.slices()]), name
            seen[name][part.rect.slices()] = filled
    assert all(torch.equal(seen[name], value) for name, value in whole.items())


def test_fused_experts_of_a_rank(mixtral: Path, sharded: moeconv.Checkpoint) -> None:
    degrees = moeconv.Degrees(ep=2, etp=2, tp=2)
    parts = {n: p for n, p in sharded.rank(degrees, tp=1, ep=1).items() if "experts" not in n}
    at = "model.layers.{}.mlp.experts.{}"
    fused = {at.format(i, "gate_up_proj"): (2, 48, 32) for i in (0, 1)} | {
        at.format(i, "down_proj"): (2, 32, 24) for i in (0, 1)
    }
    module = module_of({name: part.shape for name, part in parts.items()} | fused)
    sharded.load_into(module, degrees=degrees, rank={"tp": 1, "ep": 1})
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    for layer in (0, 1):
        experts = model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        want = torch.cat([gate[2:, 24:], up[2:, 24:]], dim=1)
        assert torch.equal(module.get_parameter(at.format(layer, "gate_up_proj")), want)
        assert torch.equal(module.get_parameter(at.format(layer, "down_proj")), experts.down_proj[2:, :, 24:])


MEGATRON = [
    ("mixtral", moeconv.Degrees(tp=2, pp=2, ep=2, etp=1)),
    ("mixtral", moeconv.Degrees(pp=2, vpp=2)),
    ("mixtral", moeconv.Degrees(tp=4, ep=4, etp=1)),  # half a key/value head's group on a rank
    ("gpt_oss", moeconv.Degrees(tp=2, ep=2, etp=1)),  # transposed; gate and up take turns
    ("deepseek_v3", moeconv.Degrees(tp=2, ep=2)),  # latent attention
]


@pytest.mark.parametrize(("spec", "experts"), [("te", "grouped"), ("local", "sequential")])
@pytest.mark.parametrize(("family", "degrees"), MEGATRON, ids=lambda value: str(value).replace(" ", "-"))
def test_megatron_s_names_of_either_spec(
    tmp_path: Path, family: str, degrees: moeconv.Degrees, spec: Any, experts: Any
) -> None:
    """A module gets what an export for Megatron (which megatron-core itself judges) has for its rank, padding included."""
    folder = make_folder(tmp_path / "hf", family, num_hidden_layers=4)
    moeconv.export_megatron(folder, tmp_path / "mg", degrees, format="torch", spec=spec, experts=experts)
    source = moeconv.open(folder)
    for tp, pp, ep, chunk in (
        (t, p, e, c)
        for t in range(degrees.tp)
        for p in range(degrees.pp)
        for e in range(degrees.ep)
        for c in range(degrees.vpp)
    ):
        name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if degrees.pp > 1 else "") + (f"_{ep:03d}" if degrees.ep > 1 else "")
        if not (tmp_path / "mg/release" / name).is_dir():
            continue
        saved = torch.load(tmp_path / "mg/release" / name / "model_optim_rng.pt", weights_only=False)
        state = saved[f"model{chunk}" if degrees.vpp > 1 else "model"]
        want = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        module = module_of({key: tuple(value.shape) for key, value in want.items()})
        rank = {"tp": tp, "pp": pp, "ep": ep, "vpp": chunk}
        source.load_into(module, degrees=degrees, rank=rank, names="megatron")
        for key, value in module.named_parameters():
            assert torch.equal(value, want[key]), key
        gone = next(key for key in want if key.endswith("linear_proj.weight"))
        del module.get_submodule(gone.removesuffix(".weight")).weight
        with pytest.raises(moeconv.MoeconvError, match="no parameter for model"):
            source.load_into(module, degrees=degrees, rank=rank, names="megatron")


def test_wrappers_and_types_of_one_s_own(mixtral: Path, sharded: moeconv.Checkpoint) -> None:
    want = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    model = make_model("mixtral", seed=2).to(torch.bfloat16)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    wrapped = nn.Module()  # as DDP around torch.compile
    wrapped.add_module("module", nn.Module())
    wrapped.module.add_module("_orig_mod", model)
    sharded.load_into(wrapped)
    for (_, got), (name, value) in zip(wrapped.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(got, value.bfloat16()), name


def _drop(module: nn.Module) -> None:
    del module.get_submodule("model.layers.1.self_attn").o_proj


def _add(module: nn.Module) -> None:
    module.get_submodule("model.layers.0").register_parameter("lora_A", nn.Parameter(torch.zeros(2)))


def _buffer(module: nn.Module) -> None:
    module.get_submodule("model.norm").register_buffer("scale", torch.zeros(2))


def _reshape(module: nn.Module) -> None:
    module.get_submodule("model").norm.weight = nn.Parameter(torch.zeros(31))  # type: ignore[union-attr]


def _tie(module: nn.Module) -> None:
    module.lm_head.weight = module.get_parameter("model.embed_tokens.weight")  # type: ignore[union-attr,assignment]


def _meta(module: nn.Module) -> None:
    module.get_submodule("model").norm.to("meta")  # type: ignore[union-attr]


REFUSED: list[tuple[Callable[[nn.Module], None], str]] = [
    (_drop, r"no parameter for model\.layers\.1\.self_attn\.o_proj\.weight: leave tensors out with skip="),
    (_add, r"nothing for model\.layers\.0\.lora_A: say with names="),
    (_buffer, r"nothing for model\.norm\.scale"),
    (_reshape, r"model\.norm\.weight has shape \[31\], and \[32\] is"),
    (_tie, r"model\.embed_tokens\.weight and lm_head\.weight are one parameter"),
    (_meta, r"model\.norm\.weight are on the device meta"),
]


@pytest.mark.parametrize(("change", "what"), REFUSED, ids=[change.__name__ for change, _ in REFUSED])
def test_what_does_not_fit_is_named_and_nothing_changes(
    sharded: moeconv.Checkpoint, change: Callable[[nn.Module], None], what: str
) -> None:
    module = make_model("mixtral", seed=4)
    change(module)
    before = {name: value for name, value in values(module).items() if not value.is_meta}
    with pytest.raises(moeconv.MoeconvError, match=what):
        sharded.load_into(module)
    after = values(module)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_advice_is_right_when_obeyed(sharded: moeconv.Checkpoint) -> None:
    module = make_model("mixtral", seed=4)
    _add(module)
    sharded.load_into(module, skip=["*.lora_?"])
    del module.get_submodule("model.layers.1.self_attn").o_proj
    sharded.load_into(module, skip=["*.lora_?", "*.1.self_attn.o_proj.weight"])
    with pytest.raises(moeconv.MoeconvError, match="rank axis 'dp' is unknown"):
        sharded.load_into(module, rank={"dp": 1})
    with pytest.raises(moeconv.MoeconvError, match="ep=4: the layout has ep 4"):
        sharded.load_into(module, rank={"ep": 4})
    with pytest.raises(moeconv.MoeconvError, match="without a rank"):
        sharded.load_into(module, degrees=DEGREES)
    megatron = module_of({"decoder.layers.0.self_attention.linear_qkv.weight": (64, 32)})
    with pytest.raises(moeconv.MoeconvError, match="give names='megatron'"):
        sharded.load_into(megatron)


def test_damage_is_found_on_the_way(tmp_path: Path, mixtral: Path) -> None:
    moeconv.import_hf(mixtral, tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "dense-tp0-pp0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(moeconv.MoeconvError, match="has checksum"):
        moeconv.open(tmp_path / "ckpt").load_into(copy.deepcopy(make_model("mixtral")))

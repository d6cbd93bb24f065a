"""Adapters against peft on transformers: what the trainer computes, what it saves, and what is merged."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeconv.adapters.export import plan_peft, write_peft
from moeconv.adapters.merge import merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from runtime.data.batch import Batch
from runtime.model.lora import LoraConfig
from tests.adapters.saves import Trained, train
from tests.upcycle.hub import make_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

ALL = ("*self_attn*", "*experts*")
CASES: dict[str, tuple[str, LoraConfig]] = {
    "mixtral": ("mixtral", LoraConfig(rank=3, alpha=5.0, targets=ALL, also_train=("*layers.1*.gate.weight",))),
    "mixtral-attention": ("mixtral", LoraConfig(rank=4, dropout=0.1)),
    "qwen3_moe": ("qwen3_moe", LoraConfig(rank=4, rslora=True, targets=ALL)),
    "qwen3_moe-a-layer": ("qwen3_moe", LoraConfig(rank=4, targets=("*layers.1*up_proj*", "*layers.0*[kv]_proj*"))),
    "gpt_oss": ("gpt_oss", LoraConfig(rank=4, targets=ALL)),
    # Shared experts and a dense layer are called as experts were; the published stacks are others than transformers'.
    "glm4_moe": ("glm4_moe", LoraConfig(rank=2, targets=("*self_attn*", "*mlp*"))),
    "granitemoe": ("granitemoe", LoraConfig(rank=2, targets=ALL)),
    "deepseek_v3": ("deepseek_v3", LoraConfig(rank=2, targets=("*self_attn*", "*mlp.experts*"))),
}


@dataclass(frozen=True)
class Other(Checkpoint):
    """A save with other values in it."""

    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, save: Checkpoint, values: dict[str, Any]) -> Other:
        return cls(**{f.name: getattr(save, f.name) for f in fields(Checkpoint)}, values=values)

    def read(self, name: str, rect: Rect | None = None) -> Any:
        return self.values[name]


def batch() -> Batch:
    tokens = torch.randint(101, (2, 17), generator=torch.Generator().manual_seed(1))
    return Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:].clone())


def hub_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def peft_model(base: Path, folder: Path) -> Any:
    """The base with an adapter; that a key is missing or left over is a warning there, and an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # It looks among modules alone for what is right of parameters.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        return peft.PeftModel.from_pretrained(hub_model(base), folder, is_trainable=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(batch().tokens).logits
    return out


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, config = CASES[request.param]
    return train(tmp_path_factory.mktemp(request.param), family, config)


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    out = trained.save.parent / "peft"
    write_peft(plan_peft(trained.opened), out, Options())
    return out


def test_logits_and_gradients_are_pefts(trained: Trained, exported: Path) -> None:
    model = peft_model(trained.base.root, exported)
    engine, save = trained.engine, trained.opened
    engine.module.eval()
    want = logits(model)
    got = engine.module[0](batch().tokens).transpose(0, 1)[..., :101].detach()
    assert gap(got, want) < 1e-5
    assert gap(logits(hub_model(trained.base.root)), want) > 1e-2, "the adapters matter"
    if trained.config.dropout:
        return
    out = model(batch().tokens).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), batch().labels.flatten()).backward()
    engine.train_step([batch()])
    ours = {item.name: item.tensor.numpy() for item in engine.gradients()}
    ones = {name: np.ones_like(value) for name, value in ours.items()}
    theirs = {n.replace(".default", "").replace("modules_to_save.", ""): p.grad for n, p in model.named_parameters()}
    # What is apart here may mix in peft's stacks: B has zeros there.
    apart = {matrix.key: matrix.make() for matrix in plan_peft(Other.of(save, ones)).matrices}
    for matrix in plan_peft(Other.of(save, ours)).matrices:
        grad, expected = theirs[matrix.key].numpy() * apart[matrix.key], matrix.make()
        assert np.abs(grad - expected).max() <= 1e-5 * np.abs(expected).max(), matrix.key


@pytest.mark.parametrize("sharded", [False, True])
def test_merged_logits_are_pefts(trained: Trained, exported: Path, tmp_path: Path, sharded: bool) -> None:
    want = logits(peft_model(trained.base.root, exported))
    base = trained.base
    if sharded:
        write_sharded(base, tmp_path / "shards", Degrees(tp=2, ep=2, pp=2), Options())
        base = open_checkpoint(tmp_path / "shards")
    for number, adapter in enumerate((trained.save, exported)):
        out = tmp_path / f"merged-{number}"
        merged = merge(base, open_adapter(adapter, base.model))
        _, proof = write_merge(merged, out, Options(), hf=sharded)
        assert proof.logits_error is not None
        assert gap(logits(hub_model(out)), want) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_by_their_names_on_the_hub(name: str, tmp_path: Path) -> None:
    """The form of transformers 4: peft turns it into stacks itself."""
    family, config = CASES[name]
    trained = train(tmp_path, family, replace(config, also_train=(), rslora=False))
    folder = plan_peft(trained.opened, "experts")
    write_peft(folder, tmp_path / "peft", Options())
    want = logits(peft_model(trained.base.root, tmp_path / "peft"))
    assert any("experts.3." in matrix.key for matrix in folder.matrices)
    for number, adapter in enumerate((trained.save, tmp_path / "peft")):
        out = tmp_path / f"merged-{number}"
        write_merge(merge(trained.base, open_adapter(adapter, trained.base.model)), out, Options(), logits=False)
        assert gap(logits(hub_model(out)), want) < 1e-5


PEFTS_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "target_modules": ["o_proj"]},
    ),
    # Square matrices, which no shape tells apart from their transposes.
    "gpt_oss-square": ("gpt_oss", {"target_parameters": ["experts.down_proj"], "target_modules": []}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "target_parameters": ["1.mlp.experts.gate_up_proj"],
            "target_modules": ["k_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 3},
            "use_rslora": True,
            "modules_to_save": ["mlp.gate", "lm_head"],
        },
    ),
}


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_pefts_own_adapters_merge(name: str, tmp_path: Path) -> None:
    family, options = PEFTS_OWN[name]
    base = make_folder(tmp_path / "base", family, **({"intermediate_size": 32} if "square" in name else {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = peft.get_peft_model(
            hub_model(base), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(tmp_path / "peft")
    source = open_checkpoint(base)
    _, proof = write_merge(merge(source, open_adapter(tmp_path / "peft", source.model)), tmp_path / "merged", Options())
    assert proof.logits_error is not None
    assert gap(logits(hub_model(tmp_path / "merged")), logits(model)) < 1e-5
    assert gap(logits(hub_model(base)), logits(model)) > 1e-2

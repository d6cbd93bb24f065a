"""What a merge refuses, and that its proof finds what went wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cli.main import main
from moeconv.adapters.export import plan_peft, write_peft
from moeconv.adapters.merge import Merged, ProofError, merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import IntegrityError, MappingError, MoeconvError, SourceError
from moeconv.families.adapted import adapter_names
from moeconv.layout.degrees import Degrees
from runtime.model.lora import LoraConfig
from tests.adapters.saves import Trained, random_values, train
from tests.upcycle.hub import make_folder

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config = LoraConfig(rank=4, targets=("*self_attn*", "*experts*"))
    return train(tmp_path_factory.mktemp("refused"), "mixtral", config, torch.bfloat16)


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    out = trained.save.parent / "peft"
    write_peft(plan_peft(trained.opened), out, Options())
    return out


def changed(exported: Path, out: Path, tensors: Callable[[Tensors], object], **config: Any) -> Path:
    """A copy of a PEFT folder with other tensors and other fields in its config."""
    shutil.copytree(exported, out)
    held = load_file(out / "adapter_model.safetensors")
    tensors(held)
    save_file(held, out / "adapter_model.safetensors")
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def renamed(old: str, new: str) -> Callable[[Tensors], object]:
    def change(held: Tensors) -> None:
        for name in [name for name in held if old in name]:
            held[name.replace(old, new)] = held.pop(name)

    return change


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
UNAPPLIED: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "a missing B": (lambda held: held.pop(KEY + "B.weight"), {}, "q_proj has lora_A alone"),
    "a layer too many": (renamed("layers.1.", "layers.7."), {}, r"layers\.7\..* belongs to no weight of the model: it would be left out"),
    "an unknown module": (renamed("q_proj", "qq_proj"), {}, "qq_proj belongs to no weight"),
    "a transposed B": (lambda held: held.update({KEY + "B.weight": held[KEY + "B.weight"].T.copy()}), {}, r"has shapes \[4, 32\] and \[4, 32\]"),
    "experts that no target names": (lambda held: None, {"target_parameters": ["experts.down_proj"]}, "experts.base_layer belongs to no weight"),
    "another rank": (lambda held: None, {"r": 2}, "says rank 2"),
    "a magnitude": (lambda held: held.update({KEY + "magnitude_vector": np.ones(32, np.float32)}), {}, "magnitude_vector is no LoRA matrix"),
    "DoRA": (lambda held: None, {"use_dora": True}, "use_dora is True: such an adapter is more than"),
    "PiSSA": (lambda held: None, {"init_lora_weights": "pissa_niter_4"}, "changed the model's own weights too"),
    "another method": (lambda held: None, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "nothing": (lambda held: held.clear(), {}, "holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNAPPLIED)
def test_whatever_would_be_left_out_is_refused(trained: Trained, exported: Path, tmp_path: Path, case: str) -> None:
    tensors, config, message = UNAPPLIED[case]
    folder = changed(exported, tmp_path / "peft", tensors, **config)
    with pytest.raises((MappingError, SourceError), match=message):
        open_adapter(folder, trained.base.model)


def test_another_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = open_checkpoint(make_folder(tmp_path / "other", "mixtral", torch.bfloat16, seed=1))
    with pytest.raises(IntegrityError, match="holds other weights"):
        merge(other, open_adapter(trained.save, other.model))
    with pytest.raises(SourceError, match="holds adapters and not the model"):
        open_checkpoint(trained.save)
    wider = open_checkpoint(make_folder(tmp_path / "wider", "mixtral", torch.bfloat16, intermediate_size=64))
    with pytest.raises(MappingError, match="in another shape"):
        open_adapter(trained.save, wider.model)


def test_sums_are_rounded_once_and_the_layout_stays(trained: Trained, tmp_path: Path) -> None:
    write_sharded(trained.base, tmp_path / "shards", Degrees(tp=2, ep=2, etp=1), Options())
    base = open_checkpoint(tmp_path / "shards")
    _, proof = write_merge(merge(base, open_adapter(trained.save, base.model)), tmp_path / "merged", Options(workers=1))
    out = open_checkpoint(tmp_path / "merged")
    assert out.degrees == base.degrees
    assert proof.logits_error is not None
    assert proof.logits_error < 1e-3
    assert 1e-3 < proof.rounding < 1e-1, "of what bf16 rounds"
    model = trained.engine._context.model
    values = random_values(model)  # type: ignore[arg-type]
    assert proof.weights == len(model.adapted) == 2 * (4 + 4 * 3)  # type: ignore[attr-defined]
    for name in base.tensors:
        a, b = adapter_names(name)
        want = base.read(name)
        if a in values:
            sums = want.astype(np.float32) + np.float32(trained.config.scale) * (values[b] @ values[a])
            want = sums.astype(ml_dtypes.bfloat16)
        same = out.read(name).astype(np.float32) == want.astype(np.float32)
        assert same.mean() > 0.999, name  # a last bit of an fp32 sum may decide a rounding
    # The way back: the files of the folder that was imported.
    write_hf(out, tmp_path / "hub", None, Options())
    assert {p.name for p in (tmp_path / "hub").iterdir()} == {p.name for p in trained.base.root.iterdir()}


def test_the_proof_finds_a_delta_that_was_not_added(trained: Trained, tmp_path: Path) -> None:
    merged = merge(trained.base, open_adapter(trained.save, trained.base.model))
    forgotten = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    broken: Merged = replace(merged, ops={name: op for name, op in merged.ops.items() if name != forgotten})
    with pytest.raises(ProofError, match=rf"{forgotten}\[.*Nothing was finished"):
        write_merge(broken, tmp_path / "merged", Options())
    assert not (tmp_path / "merged").exists()


def test_commands(trained: Trained, tmp_path: Path) -> None:
    def call(*words: object) -> Any:
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run = trained.save.parent
    planned = call("merge", trained.base.root, run, tmp_path / "merged", "--dry-run", "--json")
    assert planned["added_to"] == 32
    assert planned["proof"] is None
    assert not (tmp_path / "merged").exists()
    done = call("merge", trained.base.root, run, tmp_path / "merged", "--json")
    assert done["proof"]["logits_error"] < done["proof"]["bound"] == 1e-3
    made = call("export-adapter", run, tmp_path / "peft", "--base-name", "someone/model", "--json")
    assert made["config"]["base_model_name_or_path"] == "someone/model"
    assert made["config"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert made["config"]["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]


def test_a_damaged_adapter_is_refused(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.save, tmp_path / "save")
    path = tmp_path / "save" / "moeconv.json"
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    with pytest.raises(MoeconvError, match="the manifest was changed"):
        open_adapter(tmp_path / "save", trained.base.model)

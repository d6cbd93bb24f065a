"""Adapters over a quantised base, against peft on transformers over weights that the library quantised and made numbers again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeconv.adapters.export import plan_peft, write_peft
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options
from moeconv.errors import MoeconvError
from moeconv.families.adapted import ADAPTABLE, AdaptedModel
from moeconv.layout.rect import Rect
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.measures import params_norm
from runtime.model.lora import LoraConfig
from runtime.quantised.sizes import piece_bytes
from runtime.settings.flags import parse_flags
from runtime.start import prepare
from tests.adapters.saves import Trained, train
from tests.adapters.test_peft import ALL, Other, batch, gap, logits, peft_model
from tests.runtime.quantised import library
from tests.upcycle.hub import make_folder

MATRICES = re.compile(r"self_attn\.\w+_proj\.weight|\bexperts\.(\d+\.\w+\.weight|(gate_up|down)_proj)$")
CASES = {
    "mixtral-nf4": ("mixtral", LoraConfig(rank=3, targets=ALL, quantize_base="nf4")),
    "mixtral-fp8": ("mixtral", LoraConfig(rank=4, quantize_base="fp8")),
    "qwen3_moe-nf4": ("qwen3_moe", LoraConfig(rank=4, targets=ALL, quantize_base="nf4")),
    "qwen3_moe-fp8": ("qwen3_moe", LoraConfig(rank=4, targets=ALL, quantize_base="fp8")),
    "gpt_oss-nf4": ("gpt_oss", LoraConfig(rank=2, targets=ALL, quantize_base="nf4")),
}


def quantised_folder(source: Path, out: Path, numbers: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Copy a folder with what the library leaves of its matrices; give how many there were."""
    shutil.copytree(source, out)
    count = 0
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if MATRICES.search(name):
                matrices = tensor.unbind() if tensor.dim() == 3 else [tensor]
                count += len(matrices)
                tensors[name] = torch.stack([numbers(m.contiguous()) for m in matrices]).view(tensor.shape)
        save_file(tensors, path, metadata={"format": "pt"})
    return count


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, config = CASES[request.param]
    return train(tmp_path_factory.mktemp(request.param), family, config)


def test_logits_and_gradients_are_pefts_over_the_librarys_numbers(trained: Trained, tmp_path: Path) -> None:
    numbers = library.nf4_numbers if trained.config.quantize_base == "nf4" else library.fp8_numbers
    count = quantised_folder(trained.base.root, tmp_path / "numbers", numbers)
    engine, save = trained.engine, trained.opened
    assert engine.quantised is not None
    assert count == sum(len(member.topology.pieces) for member in engine.quantised.members)
    write_peft(plan_peft(save), tmp_path / "peft", Options())
    model = peft_model(tmp_path / "numbers", tmp_path / "peft")
    want = logits(model)
    engine.module.eval()
    got = engine.module[0](batch().tokens).transpose(0, 1)[..., :101].detach()
    assert gap(got, want) < 1e-5
    assert gap(logits(peft_model(trained.base.root, tmp_path / "peft")), want) > 1e-3, "numbers of few bits are others"
    out = model(batch().tokens).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), batch().labels.flatten()).backward()
    engine.train_step([batch()])
    ours = {item.name: item.tensor.numpy() for item in engine.gradients()}
    ones = {name: np.ones_like(value) for name, value in ours.items()}
    theirs = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()}
    apart = {matrix.key: matrix.make() for matrix in plan_peft(Other.of(save, ones)).matrices}
    for matrix in plan_peft(Other.of(save, ours)).matrices:
        grad, expected = theirs[matrix.key].numpy() * apart[matrix.key], matrix.make()
        assert np.abs(grad - expected).max() <= 1e-5 * np.abs(expected).max(), matrix.key


def test_memory_is_the_formula(trained: Trained) -> None:
    engine, model, kind = trained.engine, trained.engine._context.model, trained.config.quantize_base
    assert isinstance(model, AdaptedModel)
    assert engine.quantised is not None
    assert kind is not None
    chosen = [t for t in model.tensors.values() if t.rule.role in ADAPTABLE]
    assert engine.quantised.nbytes == sum(piece_bytes(kind, (t.shape[0], t.shape[1])) for t in chosen)
    largest = max(member.weight.shape.numel() for member in engine.quantised.members)
    assert engine.quantised.workspace_bytes == 4 * largest
    # Nothing else of the base is there: neither weights nor gradients.
    parameters, padding = sum(p.numel() for p in engine.module.parameters()), 2 * 3 * 32  # of the vocabulary
    assert parameters == sum(t.size for t in model.tensors.values()) - sum(t.size for t in chosen) + padding
    frozen = [shard for shard in engine.store.shards if shard.topology.frozen]
    assert frozen
    assert all(shard.grad_shard.numel() == 0 for shard in frozen)


def test_what_is_trained_whole_is_not_quantised(tmp_path: Path) -> None:
    whole = "model.layers.0.self_attn.o_proj.weight"
    config = LoraConfig(rank=2, targets=("*[qkv]_proj*",), also_train=(whole,), quantize_base="nf4", double_quant=True)
    engine = train(tmp_path, "mixtral", config).engine
    assert engine.quantised is not None
    names = {piece.name for member in engine.quantised.members for piece in member.topology.pieces}
    assert whole not in names
    assert whole.replace("layers.0", "layers.1") in names
    plain = train(tmp_path / "plain", "mixtral", replace(config, quantize_base=None, double_quant=False)).engine
    before = float(params_norm(plain))
    assert params_norm(engine) == pytest.approx(before, rel=0.02)
    assert params_norm(engine) != before


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_what_no_scale_describes_is_refused(kind: Literal["nf4", "fp8"], tmp_path: Path) -> None:
    engine = train(tmp_path, "mixtral", LoraConfig(rank=2, quantize_base=kind)).engine
    assert engine.quantised is not None
    base = open_checkpoint(tmp_path / "base")

    def read(name: str, rect: Rect) -> np.ndarray[Any, Any]:
        values = base.read(name, rect)
        if name.endswith("1.self_attn.k_proj.weight"):
            values[3, 5] = np.inf
        return values

    with pytest.raises(ConfigError, match=r"--quantize-base: .*layers\.1\.self_attn\.[kv]_proj.* not finite"):
        engine.quantised.load(read)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantize-base", "nf4"), "--quantize-base nf4 does nothing here: it needs --lora-rank"),
        (("--lora-rank", "2", "--double-quant"), "--double-quant does nothing here: it needs --quantize-base nf4"),
        (("--lora-rank", "2", "--quantize-base", "fp8", "--fully-shard"), "--fully-shard.* doesn't shard"),
        (("--lora-rank", "2", "--quantize-base", "fp4"), "fp4.*nf4"),
    ],
)
def test_settings_that_do_not_fit(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "mixtral", torch.float32)
    flags = ["--load", str(base), "--mock-data", "--train-iters", "1", "--seq-length", "16", *words]
    with pytest.raises(MoeconvError, match=message):
        prepare(parse_flags(flags), Process())

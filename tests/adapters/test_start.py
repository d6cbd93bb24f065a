"""Training on from a PEFT folder (`--adapter`): what the model then computes is peft's, and what can't be taken over is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeconv.adapters.export import plan_peft, write_peft
from moeconv.adapters.merge import merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.convert import Options
from moeconv.families.adapted import AdaptedModel
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.loading import load
from runtime.model.lora import LoraConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.flags import parse_flags
from runtime.settings.origin import Origin
from runtime.settings.run import RunConfig
from runtime.start import prepare
from tests.adapters.saves import train
from tests.upcycle.hub import make_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}),
    "gpt_oss": ("gpt_oss", {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "target_modules": ["o_proj"]}),
    "mixed": (
        "qwen3_moe",
        {
            "target_parameters": ["1.mlp.experts.gate_up_proj"], "target_modules": ["k_proj"], "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 3}, "use_rslora": True, "modules_to_save": ["mlp.gate", "lm_head"],
        },
    ),
}  # fmt: skip
TOKENS = torch.arange(40).view(2, 20) * 37 % 101


def hub_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def make_peft(folder: Path, family: str, **options: Any) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter that peft saved, and the logits of both together."""
    base = make_folder(folder / "base", family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
        model = peft.get_peft_model(hub_model(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(folder / "peft")
    with torch.no_grad():
        return base, folder / "peft", model.eval()(TOKENS).logits


def begin(base: Path, adapter: Path, *more: object) -> tuple[RunConfig, Origin]:
    words = ["--load", base, "--adapter", adapter, "--mock-data", "--train-iters", 1, "--seq-length", 20, *more]
    return prepare(parse_flags([str(word) for word in words]), Process())


def logits(run: RunConfig, origin: Origin) -> torch.Tensor:
    mesh = ParallelMesh(run.parallel)
    settings = (run.parallel, run.moe, run.optim, run.recompute)
    engine = Engine(run.model, torch.float32, *settings, mesh, torch.device("cpu"), lora=run.lora)
    assert load(engine, run, origin) is None
    engine.module.eval()
    with torch.no_grad():
        out: torch.Tensor = engine.module[0](TOKENS)
    return out.transpose(0, 1)[..., :101]


@pytest.mark.parametrize("name", CASES)
def test_a_run_begins_with_what_peft_computes(name: str, tmp_path: Path) -> None:
    family, options = CASES[name]
    base, adapter, want = make_peft(tmp_path, family, **options)
    run, origin = begin(base, adapter)
    assert (run.lora.rank, run.lora.alpha, run.lora.rslora) == (4, 6.0, name == "mixed")
    got = logits(run, origin)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    with torch.no_grad():
        assert float((hub_model(base)(TOKENS).logits - want).abs().max() / want.abs().max()) > 1e-2
    assert any("beginning with the adapters of" in note for note in run.notes)


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    """Its stacks have twice the rank, half of it zero: the run's rank is again what it was."""
    config = LoraConfig(rank=3, alpha=5.0, targets=("*self_attn*", "*experts*"), also_train=("*layers.1*.gate.weight",))
    trained = train(tmp_path, "mixtral", config)
    write_peft(plan_peft(trained.opened), tmp_path / "peft", Options())
    run, origin = begin(trained.base.root, tmp_path / "peft", "--lora-rank", 3, "--lora-alpha", 5)
    assert isinstance(run.model, AdaptedModel)
    saved = trained.opened.model
    assert isinstance(saved, AdaptedModel)
    assert (run.model.adapted, run.model.whole) == (saved.adapted, saved.whole)
    trained.engine.module.eval()
    with torch.no_grad():
        want = trained.engine.module[0](TOKENS).transpose(0, 1)[..., :101]
    got = logits(run, origin)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6
    (tmp_path / "peft" / "chat_template.jinja").write_text("{{ messages }}")
    opened = open_adapter(tmp_path / "peft", trained.base.model)
    write_merge(merge(trained.base, opened), tmp_path / "merged", Options(), logits=False)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(ConfigError, match="is a run's: give it with --load"):
        begin(trained.base.root, trained.save)


def test_other_flags_are_refused_and_routers_may_be_trained_too(tmp_path: Path) -> None:
    base, adapter, want = make_peft(tmp_path, "mixtral", target_modules=["q_proj", "o_proj"])
    for words, message in (
        (["--lora-rank", "8"], r"--lora-rank is 8; the adapters in --adapter .* have 4: leave it out"),
        (["--lora-rank", "4", "--lora-alpha", "8"], r"--lora-alpha is 8\.0; .* have 6\.0"),
        (["--lora-targets", "*q_proj*"], r"--lora-targets: names other weights .* such as .*o_proj.weight \(the folder has it alone\)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            begin(base, adapter, *words)
    run, origin = begin(base, adapter, "--lora-targets", "*[qo]_proj*", "--lora-also-train", "*.gate.weight")
    assert isinstance(run.model, AdaptedModel)
    assert len(run.model.whole) == 2
    assert float((logits(run, origin) - want).abs().max() / want.abs().max()) < 1e-5
    _, head, _ = make_peft(tmp_path / "head", "mixtral", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"adapts lm_head.weight, which can't have an adapter here"):
        begin(base, head)

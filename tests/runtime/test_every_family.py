"""Every family's day: upcycled where it is a mixture, trained on two ranks, exported, and computed by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.planned import plan_upcycle
from moeconv.upcycling.recipe import Recipe
from runtime.compare import runtime_logits
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_text
from tests.runtime.words import VOCAB_SIZE, make_tokenizer
from tests.upcycle.hub import make_folder

# Carrier -> dense source, options of the source, recipe.
UPCYCLED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", {}, {"method": "virtual-group", "granularity": 2}),
    "qwen2_moe": ("qwen2", {}, {"method": "virtual-group", "granularity": 2, "shared_experts": 1}),
    "qwen3_moe": ("qwen3", {"tie_word_embeddings": True}, {"method": "copy"}),
    "dots1": ("qwen3", {}, {"method": "virtual-group", "granularity": 2, "shared_experts": 1}),
    "glm4_moe": ("qwen2", {}, {"method": "copy", "shared_experts": 1, "carrier": "glm4_moe"}),
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "mlp_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {},
}
CHANGED = "qwen3_moe"  # upcycled with weights that sum to 1, then trained without, on purpose
BIASED = ("dots1", "glm4_moe")
VOCAB = VOCAB_SIZE + 8  # some families' tokenizers add tokens of their own


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    folder = tmp_path_factory.mktemp("families")
    text = make_text(folder / "text.txt")
    jobs = []
    for name in (*UPCYCLED, *DENSE):
        source = folder / f"{name}-source"
        if name in DENSE:
            make_tokenizer(make_folder(source, name, vocab_size=VOCAB, **DENSE[name]))
        else:
            kind, options, recipe = UPCYCLED[name]
            make_tokenizer(make_folder(folder / f"{name}-dense", kind, vocab_size=VOCAB, **options))
            planned = plan_upcycle(open_checkpoint(folder / f"{name}-dense"), Recipe(experts=4, **recipe))
            assert planned.family.model_type == name
            write_sharded(planned, source, Degrees(ep=2), Options())
        words = [
            "--load", source, "--data", text, "--save", folder / f"{name}-run", "--data-cache-path", folder / "cache",
            "--train-iters", 2, "--seq-length", 64, "--global-batch-size", 4, "--lr", 1e-2,
            "--tensor-model-parallel-size", 2, "--sequence-parallel",
        ]  # fmt: skip
        if name in UPCYCLED:
            words += ["--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1]
        else:
            words.append("--tp-comm-overlap")
        if name in BIASED:
            words.append("--moe-router-enable-expert-bias")
        if name == CHANGED:
            words += ["--override-router", "--moe-router-pre-softmax"]
        jobs.append(Job(2, tuple(map(str, words))))
    run_jobs(jobs, pool)
    return folder


@pytest.mark.parametrize("name", [*UPCYCLED, *DENSE])
def test_trained_and_exported_it_computes_the_same_in_transformers(name: str, place: Path) -> None:
    run, exported = place / f"{name}-run" / "latest", place / f"{name}-hf"
    write_hf(open_checkpoint(run), exported, None, Options())
    model, report = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.model_type == name
    tokens = torch.arange(120).view(2, 60) * 37 % VOCAB_SIZE
    with torch.no_grad():
        want = model.eval()(tokens).logits
    assert float((runtime_logits(run, tokens) - want).abs().max() / want.abs().max()) < 1e-5
    if name == CHANGED:
        assert model.config.norm_topk_prob is False
    before = open_checkpoint(place / f"{name}-source")
    trained = open_checkpoint(run)
    changed = [n for n in before.tensors if (before.read(n) != trained.read(n)).any()]
    assert len(changed) > 0.9 * len(before.tensors)
    biases = [n for n in changed if n.endswith("e_score_correction_bias")]
    assert bool(biases) == (name in BIASED)

"""Runs from nothing: every layout draws the same bits, and the whole of a Megatron script trains, resumes and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf
from runtime.compare import runtime_logits
from runtime.data.config import DataConfig
from runtime.data.loader import DataSource
from runtime.initial.config import InitConfig
from runtime.initial.draw import DrawnCheckpoint, drawn_checkpoint
from runtime.parity.case import Array, Case, assemble, copies, make_engine, model_of
from runtime.parity.ranks import RankPool
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.launch import steps
from tests.runtime.parallel.test_resume import LAYOUTS
from tests.runtime.settings.lines import SCRIPT
from tests.runtime.words import VOCAB_SIZE, make_tokenizer, real_text

# What the script's numbers become; degrees are scaled from 16 ranks to 4.
SIZES = {
    "--seq-length": 64, "--max-position-embeddings": 256, "--num-layers": 4, "--hidden-size": 64, "--ffn-hidden-size": 96,
    "--num-attention-heads": 8, "--num-query-groups": 2, "--num-experts": 4, "--expert-model-parallel-size": 2,
    "--tensor-model-parallel-size": 2, "--global-batch-size": 8, "--train-iters": 2, "--lr-warmup-iters": 1,
    "--lr-decay-iters": 4,
}  # fmt: skip


def drawn(case: Case) -> DrawnCheckpoint:
    return drawn_checkpoint(Path("new"), model_of(case), case.dtype, 7, InitConfig(), {"config.json": b"{}"})


def draw_on_a_rank(case: Case) -> Any:
    engine, _ = make_engine(case)
    engine.load_state(drawn(case).read)
    return copies(engine.state(with_optimizer=True))


@pytest.mark.parametrize(
    ("layout", "dtype"), [("one", "float32"), *((layout, "bfloat16") for layout in LAYOUTS if layout != "dp2-dist")]
)
def test_every_layout_draws_the_same_bits(layout: str, dtype: str, pool: RankPool) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    case = Case(name=layout, num_ranks=num_ranks, parallel=parallel, dtype=dtype, model={"vocab_size": 61})
    ranks = pool.run(num_ranks, draw_on_a_rank, case)
    tensors: dict[str, Array] = assemble(part for parts in ranks for part in parts)
    checkpoint = drawn(case)
    for name in checkpoint.tensors:
        want = checkpoint.read(name).astype(np.float32)
        assert np.array_equal(tensors[name], want), name
        if dtype == "bfloat16":
            assert np.array_equal(tensors[f"optimizer.master.{name}"], want), name


def script(folder: Path, save: str, **changes: object) -> Job:
    """The script at tiny sizes; flags of two letters and more stand for themselves, None takes a switch out."""
    words = SCRIPT.split()
    words = words[: words.index("--wandb-project")]  # the two that people add who have an account
    places = {"tok/tokenizer.model": folder / "tok", "data_text_document": folder / "text.jsonl"}
    words = [str(places.get(word, word)) for word in words]
    words = [word.replace("ckpt", str(folder / save), 1) if word.startswith("ckpt") else word for word in words]
    for flag, value in SIZES.items():
        words[words.index(flag) + 1] = str(value)
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            words.remove(flag)
        elif flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    return Job(4, (*words, "--data-cache-path", str(folder / "cache")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "tok").mkdir()
    make_tokenizer(folder / "tok")
    # Of 99990,8,2 the validation gets two documents in 30,000, and repeats them as Megatron does.
    lines = [" ".join(words) for words in zip(*[iter((real_text() * 6).split())] * 2, strict=False)][:30_000]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (folder / "run").mkdir()  # empty; the other isn't there at all
    run_jobs(
        [
            script(folder, "run"),
            script(folder, "run", train_iters=3),
            script(folder, "still", bf16=None, lr=0, min_lr=0, train_iters=1, moe_aux_loss_coeff=0),
        ],
        pool,
    )
    for name in ("run", "still"):
        write_hf(open_checkpoint(folder / name / "latest"), folder / f"{name}-hf", None, Options())
    return folder


def test_the_script_trains_and_goes_on(place: Path) -> None:
    text = (place / "run" / "metrics.jsonl").read_text()
    assert f"DRAWING WEIGHTS: no checkpoint at --load {place}/run, which is empty. A new Mixtral" in text
    assert text.count("DRAWING WEIGHTS") == 1
    assert "going on after iteration 2" in text
    assert "--init-method-std 0.01: no effect here" in text  # the second time
    assert list(steps(place / "run" / "metrics.jsonl")) == [1, 2, 3]
    assert (place / "run" / "tensorboard").is_dir()


@pytest.mark.parametrize("name", ["run", "still"])
def test_transformers_loads_the_export_and_computes_the_same(name: str, place: Path) -> None:
    exported = place / f"{name}-hf"
    model, report = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.dtype == torch.float32
    assert json.loads((exported / "config.json").read_text())["torch_dtype"] == (
        "bfloat16" if name == "run" else "float32"
    )
    tokens = torch.arange(120).view(2, 60) * 37 % VOCAB_SIZE
    with torch.no_grad():
        want = model.eval()(tokens).logits
    assert float((runtime_logits(place / name / "latest", tokens) - want).abs().max() / want.abs().max()) < 1e-5
    tokenizer, own = AutoTokenizer.from_pretrained(exported), AutoTokenizer.from_pretrained(place / "tok")
    assert tokenizer(real_text()).input_ids == own(real_text()).input_ids
    assert (model.config.bos_token_id, model.config.eos_token_id) == (own.bos_token_id, own.eos_token_id)
    assert model.generation_config.eos_token_id == own.eos_token_id


def test_first_losses_are_transformers(place: Path) -> None:
    [first] = steps(place / "still" / "metrics.jsonl").values()
    exported = place / "still-hf"
    config = DataConfig(
        data_path=(str(place / "text.jsonl"),), split=(99990, 8, 2), seq_length=64, vocab_size=VOCAB_SIZE,
        data_cache_path=place / "cache",
    )  # fmt: skip
    samples = DataSource(config, exported).samples("train")
    rows = torch.from_numpy(np.stack([samples.sample(i) for i in range(8)]))
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    want = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten())
    assert first["lm_loss"] == pytest.approx(float(want), rel=1e-5)
    assert float(want) == pytest.approx(np.log(VOCAB_SIZE), rel=0.01)  # of weights that know nothing


def test_the_runs_weights_are_the_draw(place: Path) -> None:
    """A learning rate of 0 leaves what four ranks drew; one process draws the same."""
    saved = open_checkpoint(place / "still" / "latest")
    checkpoint = drawn_checkpoint(Path("new"), saved.model, "float32", 1234, InitConfig(), {"config.json": b"{}"})
    assert set(saved.tensors) >= set(checkpoint.tensors)
    for name in checkpoint.tensors:
        assert np.array_equal(saved.read(name), checkpoint.read(name)), name

"""Optimizer state and the position of a run, between the real megatron-core and ours."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cli.main import main
from moeconv.checking import compare
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options
from moeconv.errors import MappingError
from moeconv.layout.degrees import Degrees
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import export_megatron, import_megatron, open_megatron
from runtime.checkpoint.position import TrainerState
from runtime.parity.ranks import RankPool
from tests.megatron.conftest import make_model, tensors_of
from tests.megatron.mcore_ranks import Case
from tests.megatron.mcore_training import BATCH, DECAY, LR, SEED, STEPS, Run, run_all
from tests.megatron.test_round_trips import export
from tests.runtime.jobs import Job, run_jobs
from tests.upcycle.hub import make_folder

# name -> the layout that Megatron saves under, how its run differs, and the layout of our export, which loads under both
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2-ep2": ({"tp": 2, "ep": 2}, {}, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}),
    "pp2-ep2-bf16": ({"pp": 2, "ep": 2}, {"dtype": "bfloat16"}, {"tp": 2, "ep": 2, "etp": 1}),
    "dp2-fp16": ({"tp": 2}, {"dtype": "float16"}, {"pp": 2}),
    "dp4": ({}, {}, {"tp": 2}),
    "glm4": ({"tp": 2, "ep": 2, "etp": 1}, {}, {"ep": 4}),
    "plain-bf16": ({"tp": 2}, {"dtype": "bfloat16", "distributed": False}, {}),
    "plain-fp32": ({"tp": 2}, {"distributed": False}, {}),
}
RESUMED = [name for name, (_, changes, _) in RUNS.items() if changes.get("distributed", True)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> Path:
    """Where megatron-core saved each run (`NAME`) from `NAME-hf`, and what our import made of it (`NAME-shards`)."""
    work: Path = tmp_path_factory.mktemp("training")
    # Half the experts of other tests' models: two on a rank with ep 2, and half the tensors to save and load.
    folders = {
        name: make_model(work / name, getattr(torch, name), num_local_experts=4)
        for name in ("float32", "bfloat16", "float16")
    }
    # Layers with and without experts, shared experts, head norms, and a stored bias of the router that no optimizer moves.
    folders["glm4"] = make_folder(work / "glm4_moe", "glm4_moe", n_routed_experts=8, use_qk_norm=True, vocab_size=250)
    runs = []
    for name, (layout, changes, _) in RUNS.items():
        (work / f"{name}-hf").symlink_to(folders.get(name, folders[changes.get("dtype", "float32")]))
        weights = export(work / f"{name}-hf", work / f"{name}-weights", "torch_dist", layout, "local")
        case = Case(load=str(weights), fmt="torch_dist", save=str(work / name), **layout)
        runs.append(Run(case, **changes))
    run_all(runs, work / "saving")
    for name in RUNS:
        shards = work / f"{name}-shards"
        import_megatron(open_megatron(work / name, optimizer=True), shards, Degrees(tp=2, ep=4), Options())
    return work


def reference(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch's AdamW makes of a tensor in the steps of a run whose gradient is the tensor's first value."""
    parameter = torch.nn.Parameter(value.float().clone())
    decay = DECAY if value.dim() > 1 else 0.0
    adam = torch.optim.AdamW([parameter], lr=LR, weight_decay=decay, eps=1e-7)
    parameter.grad = value.float().clone()
    for _ in range(STEPS):
        adam.step()
    state = adam.state[parameter]
    return {"master": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.read(name).astype("float32"))


@pytest.mark.parametrize("name", RUNS)
def test_every_tensor_has_its_own_state(work: Path, name: str) -> None:
    imported, original = open_checkpoint(work / f"{name}-shards"), tensors_of(work / f"{name}-hf")
    for tensor, value in original.items():
        weight = read(imported, tensor)
        if imported.model.tensors[tensor].rule.buffer:
            assert torch.equal(weight, value)
            continue
        expected = reference(value)
        torch.testing.assert_close(weight, expected["master"].to(value.dtype).float(), rtol=1e-6, atol=1e-8)
        for state, wanted in expected.items():
            if name != "plain-fp32" or state != "master":  # its weights are the masters
                got = read(imported, f"optimizer.{state}.{tensor}")
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)
    states = 2 if name == "plain-fp32" else 3
    buffers = sum(tensor.rule.buffer for tensor in imported.model.tensors.values())
    assert len(imported.tensors) == len(original) * (1 + states) - states * buffers


@pytest.mark.parametrize("name", RUNS)
def test_the_position_of_the_run(work: Path, name: str) -> None:
    path = work / f"{name}-shards/trainer.json"
    state = TrainerState.from_json(path.read_text(), path)
    assert (state.iteration, state.consumed_train_samples, state.seed) == (STEPS, STEPS * BATCH, SEED)
    assert state.schedule == {
        "max_lr": LR,
        "min_lr": LR / 10,
        "style": "constant",
        "warmup_iters": 0,
        "decay_iters": 100,
    }
    scale = {"loss_scale": 2.0**8, "good_steps": STEPS} if name.endswith("fp16") else {}
    settings = {"num_steps": STEPS, "betas": [0.9, 0.999], "eps": 1e-7, "weight_decay": DECAY}
    assert state.optimizer == settings | scale


def test_megatron_core_goes_on_from_our_export(work: Path, tmp_path: Path) -> None:
    """It loads its own save and ours, and does one more step: the same bits in every rank, under the run's own layout and another."""
    runs, names = [], []
    for name in RESUMED:
        layout, changes, degrees = RUNS[name]
        ours = tmp_path / name
        made = Degrees(**degrees)
        export_megatron(
            work / f"{name}-shards",
            ours,
            fmt="torch_dist",
            degrees=made,
            spec="local",
            experts="sequential",
            options=Options(),
        )
        for under in (layout, degrees) if name != "glm4" else (layout,):
            for load in (work / name, ours):
                runs.append(Run(Case(load=str(load), fmt="torch_dist", **under), resume=True, **changes))
                names.append(f"{name} under {under}")
    held = run_all(runs, tmp_path / "resuming")
    for index in range(0, len(runs), 2):
        for theirs, ours_held in zip(held[index], held[index + 1], strict=True):
            assert theirs.keys() == ours_held.keys()
            for key, value in theirs.items():
                assert torch.equal(value, ours_held[key]), f"{names[index]}: {key}"


@pytest.mark.parametrize("name", RESUMED)
def test_round_trip(work: Path, tmp_path: Path, name: str) -> None:
    """Exported and imported again: every byte of weights, masters, moments and position."""
    shards, out = work / f"{name}-shards", tmp_path / "megatron"
    degrees = Degrees(tp=2, pp=2, ep=2)
    export_megatron(shards, out, fmt="torch_dist", degrees=degrees, spec="te", experts="grouped", options=Options())
    source = open_megatron(out, optimizer=True)
    assert next(compare(as_checkpoint(source), open_checkpoint(shards)), None) is None
    before = json.loads((shards / "trainer.json").read_text())
    assert json.loads(json.dumps(source.trainer)) == before


def test_what_has_no_place_is_refused_by_name(work: Path, tmp_path: Path) -> None:
    shards = work / "tp2-ep2-shards"
    options: dict[str, Any] = {"degrees": Degrees(), "spec": "te", "experts": "grouped", "options": Options()}
    with pytest.raises(MappingError, match=r"torch format keeps optimizer state by data-parallel rank.*--no-optimizer"):
        export_megatron(shards, tmp_path / "out", fmt="torch", **options)
    summary = export_megatron(shards, tmp_path / "out", fmt="torch", optimizer=False, **options)
    assert "optimizer state" in summary.dropped[0]
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.filterwarnings("ignore")  # of megatron, which unpickling its args imports
@pytest.mark.parametrize("change", ["flat", "step"])
def test_state_in_another_form_is_refused_by_name(work: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work / "tp2-ep2", copy)
    folder = copy / f"iter_{STEPS:07d}"
    if change == "flat":
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        tensors, key = metadata.state_dict_metadata, "optimizer.state.exp_avg.decoder.layers.mlp.router.weight"
        flat, start = torch.Size([4, 1, 1, 64]), torch.Size([0, 0, 0, 0])
        chunk = dataclasses.replace(tensors[key].chunks[0], offsets=start, sizes=flat)
        tensors[key] = dataclasses.replace(tensors[key], size=flat, chunks=[chunk])
        stored = metadata.storage_data
        infos = [stored.pop(index) for index in list(stored) if index.fqn == key]
        index = next(iter(stored))
        stored[dataclasses.replace(index, fqn=key, offset=start, index=None)] = infos[0]
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        message = r"exp_avg.*router\.weight has shape \[4, 1, 1, 64\].*flat slices.*--no-optimizer"
    else:
        common = torch.load(folder / "common.pt", weights_only=False)
        common["optimizer"][1]["optimizer"]["param_groups"][0]["step"] = 1.0
        torch.save(common, folder / "common.pt")
        message = r"its optimizer says \[1, 2\] of how many steps"
    with pytest.raises(MappingError, match=message):
        open_megatron(copy, optimizer=True)
    assert open_megatron(copy, optimizer=False).trainer is None


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters to a folder."""
    vocab = {chr(code): number for number, code in enumerate([*range(32, 127), 10])} | {"<unk>": 96}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)


def test_the_runtime_goes_on_from_an_import(work: Path, tmp_path: Path, pool: RankPool) -> None:
    """It takes every bit of the optimizer's state, counts on from Megatron's position, and what it saves exports again."""
    make_tokenizer(work / "pp2-ep2-bf16")
    shards = tmp_path / "shards"
    import_megatron(open_megatron(work / "pp2-ep2-bf16", optimizer=True), shards, Degrees(ep=2), Options())
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    flags = "--seq-length 32 --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --adam-eps 1e-6 --bf16"
    jobs = [
        Job(
            1,
            (
                *("--load", str(shards), "--data", str(tmp_path / "text.txt"), "--data-cache-path", str(tmp_path)),
                *("--save", str(tmp_path / f"to-{steps}"), "--train-iters", str(steps), *flags.split()),
            ),
        )
        for steps in (STEPS, STEPS + 1)
    ]
    run_jobs(jobs, pool)
    same, trained = (open_checkpoint(tmp_path / f"to-{steps}" / "latest") for steps in (STEPS, STEPS + 1))
    assert next(compare(same, open_checkpoint(shards)), None) is None
    state = json.loads(trained.carried_bytes["trainer.json"])
    assert (state["iteration"], state["consumed_train_samples"]) == (STEPS + 1, (STEPS + 1) * BATCH)
    assert state["optimizer"]["num_steps"] == STEPS + 1
    moved = [d.name for d in compare(trained, same)]
    assert len(moved) > len(same.tensors) / 2
    summary = CliRunner().invoke(
        main, ["export-megatron", str(trained.root), str(tmp_path / "back"), "--format", "torch_dist", "--ep", "2"]
    )
    assert summary.exit_code == 0, summary.output
    back = open_megatron(tmp_path / "back", optimizer=True)
    assert back.iteration == "iter_0000003"
    assert back.trainer is not None
    assert back.trainer["optimizer"] == {
        "num_steps": 3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
    }
    assert next(compare(as_checkpoint(back), trained), None) is None

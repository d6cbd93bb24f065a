"""A DeepSeek-V3 in FP8 as it is published: trained on over its own bytes, and merged into."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeconv.adapters.merge import merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.quant.view import plain_view
from runtime.checkpoint.position import TrainerState
from runtime.checkpoint.rank_files import collect_files, commit_checkpoint
from runtime.checkpoint.writer import Saver, check
from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.loading import adapter_saves, load
from runtime.model.context import TORCH_DTYPES
from runtime.parallel.mesh import ParallelMesh
from runtime.settings.flags import parse_flags
from runtime.settings.origin import Origin
from runtime.settings.run import RunConfig
from runtime.start import prepare
from tests.adapters.test_peft import gap, hub_model, logits
from tests.moeconv.quantised import quantise_folder
from tests.runtime.train.test_quantised_runs import DEEPSEEK

PROCESS = Process()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = DEEPSEEK | {"vocab_size": 101, "num_nextn_predict_layers": 0}
    folder = tmp_path_factory.mktemp("release") / "hf"
    return quantise_folder(folder, "deepseek_v3", "fp8", lambda name: name.endswith("_proj.weight"), **options)


def settings(base: Path, *more: str) -> tuple[RunConfig, Origin]:
    flags = [
        "--load",
        str(base),
        "--save",
        str(base.parent / "run"),
        "--mock-data",
        "--train-iters",
        "1",
        "--lora-rank",
        "2",
    ]
    flags += [
        "--seq-length",
        "16",
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "1",
        "--lr",
        "0.1",
        "--adam-eps",
        "1e-30",
    ]
    return prepare(parse_flags([*flags, "--lora-targets", "*self_attn*", "*experts*", *more]), PROCESS)


def trained(base: Path, *more: str) -> tuple[Engine, Path, Checkpoint]:
    """An engine that has taken a step, and its save."""
    run, origin = settings(base, *more)
    mesh = ParallelMesh(run.parallel, 1)
    parts = (run.parallel, run.moe, run.optim, run.recompute, mesh, torch.device("cpu"))
    engine = Engine(run.model, TORCH_DTYPES[run.dtype], *parts, lora=run.lora)
    assert load(engine, run, origin) is None
    engine.set_lr(0.1)
    tokens = torch.randint(101, (1, 17), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:].clone())
    for _ in range(2):
        engine.train_step([batch])
    source = adapter_saves(run, origin, PROCESS)
    saver = Saver(base.parent / f"run-{len(more)}-{base.name}", None, keep_last=0)
    files = collect_files(engine.state(with_optimizer=False), mesh, source.model, saver.stage)
    saver.save(1, files, lambda path, records: commit_checkpoint(path, records, source, run.parallel, TrainerState()))
    outcome = saver.wait()
    assert outcome is not None
    check(outcome)
    assert outcome.path is not None
    return engine, outcome.path, origin.checkpoint


@pytest.mark.parametrize("sharded", [False, True])
def test_fp8_bytes_are_taken_as_they_are(release: Path, tmp_path: Path, sharded: bool) -> None:
    base = release
    if sharded:
        base = tmp_path / "shards"
        write_sharded(open_checkpoint(release), base, Degrees(ep=2, pp=2), Options())
    engine, save, view = trained(base, "--quantize-base", "fp8", "--bf16")
    stored = load_file(release / "model.safetensors")
    assert engine.quantised is not None
    taken = 0
    for member in engine.quantised.members:
        for place, block in enumerate(member.matrices()):
            codes, scales = (part[place] for part in member.weight.parts)
            scale = stored.get(block.name.replace(".weight", ".weight_scale_inv"))
            plain = torch.from_numpy(view.read(block.name, block.rect).astype(np.float32))
            if scale is None:  # stored in bf16, and quantised here
                assert (codes.float() != 0).any()
                continue
            taken += 1
            assert torch.equal(codes.view(torch.uint8), stored[block.name].view(torch.uint8))
            assert torch.equal(scales, scale)
            numbers = member.weight.dense().float().view(len(member.topology.pieces), *block.rect.shape)[place]
            assert torch.equal(numbers, plain)
    assert taken > 20
    _merges(base, save, tmp_path, hf=sharded)


def _merges(release: Path, save: Path, tmp_path: Path, *, hf: bool) -> None:
    """Into the release, whose weights become bf16, and into its import in bf16: the same bytes."""
    base, outs = open_checkpoint(release), []
    write_sharded(plain_view(base), tmp_path / "bf16", Degrees(), Options())
    for place, source in enumerate((base, open_checkpoint(tmp_path / "bf16"))):
        outs.append(tmp_path / f"merged-{place}")
        merged = merge(source, open_adapter(save, source.model))
        assert bool(merged.notes) == (place == 0)
        _, proof = write_merge(merged, outs[-1], Options(), hf=hf or place == 1, logits=not hf)
        assert proof.weights > 20
    tensors = [{k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()} for out in outs]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert "quantization_config" not in json.loads((outs[0] / "config.json").read_text())
    assert gap(logits(hub_model(outs[0])), logits(hub_model(outs[1]))) == 0.0


def test_nf4_is_made_of_a_releases_numbers(release: Path) -> None:
    run, origin = settings(release, "--quantize-base", "nf4")
    assert not run.model.quantised
    assert any("become nf4" in note for note in origin.notes)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    part = origin.checkpoint.read(name, Rect((1, 0), (100, 128)))
    assert np.array_equal(part, plain_view(open_checkpoint(release)).read(name)[1:101])


def test_degrees_that_cut_blocks_are_refused(release: Path) -> None:
    words = ("--quantize-base", "fp8", "--tensor-model-parallel-size", "2")
    flags = [
        "--load",
        str(release),
        "--mock-data",
        "--train-iters",
        "1",
        "--lora-rank",
        "2",
        "--seq-length",
        "16",
        *words,
    ]
    with pytest.raises(ConfigError, match=r"stored as FP8.*no whole blocks of 128.*--dtype bfloat16"):
        prepare(parse_flags(flags), Process(world_size=2))

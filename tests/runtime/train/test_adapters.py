"""Runs that train adapters: saved without the model, resumed bit for bit, under other layouts, and refused where they don't fit."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moeconv.adapters.initial import initial_adapters
from moeconv.checkpoint import open_checkpoint
from moeconv.families.adapted import AdaptedModel
from moeconv.layout.rect import Rect
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.model.lora import LoraConfig
from runtime.model.targets import adapt
from runtime.parity.ranks import RankError
from runtime.settings.flags import parse_flags
from runtime.start import prepare
from tests.runtime.checkpoint.resume import losses
from tests.runtime.jobs import Job, run_jobs
from tests.runtime.tiny import make_checkpoint, make_text
from tests.support.configs import tiny_model
from tests.support.ranks import make_pool

LORA = (
    *("--lora-rank", "4", "--lora-alpha", "6", "--lora-targets", "*.self_attn.*", "*.experts.*"),
    *("--lora-also-train", "*.gate.weight"),
)
LAYOUT = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"),
    *("--expert-tensor-parallel-size", "1", "--use-distributed-optimizer", "--tp-comm-overlap"),
)


class Workplace:
    """A base, text, a run of four steps, one of two, and both ways on from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.text = make_checkpoint(folder / "base", torch.bfloat16), make_text(folder / "text.txt")
        with contextlib.closing(make_pool(2)) as pool:
            run_jobs([self.job("whole", 4), self.job("cut", 2)], pool)
            shutil.copytree(folder / "cut", folder / "two", symlinks=True)
            run_jobs([self.job("cut", 4)], pool)
            # The base is where the save says, the run goes on in a folder of its own.
            run_jobs([self.job("moved", 4, *LAYOUT, ranks=2, load=folder / "two")], pool)
            shutil.copytree(self.base, folder / "touched")
            touch(folder / "touched")
            with pytest.raises(RankError) as raised:
                run_jobs([self.job("two", 4, load=folder / "touched")], pool)
            self.refusal = str(raised.value)
            words = ("--skip-train", "--eval-iters", "2", "--seq-length", "32", "--global-batch-size", "4", "--fp32")
            given = (
                "--load",
                str(folder / "two"),
                "--data",
                str(self.text),
                "--data-cache-path",
                str(folder / "cache"),
            )
            log = ("--log-file", str(folder / "evaluated.jsonl"))
            run_jobs([Job(1, (*given, *words, *log)), Job(1, (*given, *words, *log, *LORA))], pool)

    def job(self, name: str, iterations: int, *more: str, ranks: int = 1, load: Path | None = None) -> Job:
        return Job(ranks, tuple(self.words(name, iterations, load) + list(LORA) + list(more)))

    def words(self, name: str, iterations: int, load: Path | None = None) -> list[str]:
        words = ["--load", load or self.base, "--data", self.text, "--data-cache-path", self.folder / "cache"]
        words += [
            "--save",
            self.folder / name,
            "--log-file",
            self.folder / f"{name}.jsonl",
            "--train-iters",
            iterations,
        ]
        words += [
            "--seq-length",
            32,
            "--micro-batch-size",
            1,
            "--global-batch-size",
            4,
            "--lr",
            1e-2,
            "--adam-eps",
            1e-4,
        ]
        return [str(word) for word in [*words, "--lr-decay-style", "constant", "--fp32"]]


def touch(folder: Path) -> None:
    """Change the last bit of one number of a model, in the row that its fingerprint looks at: the only one that there is."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("adapters"))


def test_a_resumed_run_has_the_same_bits(place: Workplace) -> None:
    whole, cut = (place.folder / name / "latest" for name in ("whole", "cut"))
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) == 4
    for name in [*files, "trainer.json"]:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    loss = losses(place.folder / "whole.jsonl")
    assert loss[4] < loss[1]


def test_another_layout_goes_on_alike(place: Workplace) -> None:
    want, got = losses(place.folder / "whole.jsonl"), losses(place.folder / "moved.jsonl")
    assert sorted(got) == [3, 4]
    assert all(abs(got[step] - want[step]) < 1e-5 * want[step] for step in got)
    a, b = (open_checkpoint(place.folder / name / "latest", adapters=True) for name in ("whole", "moved"))
    assert a.tensors.keys() == b.tensors.keys()
    assert b.degrees.tp == b.degrees.ep == 2
    for name in a.tensors:
        x, y = a.read(name), b.read(name)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max(), name


def test_a_save_holds_what_was_trained_alone(place: Workplace) -> None:
    save, base = open_checkpoint(place.folder / "whole" / "latest", adapters=True), open_checkpoint(place.base)
    weights = {name for name in save.tensors if not name.startswith("optimizer.")}
    assert {name for name in weights if ".lora_" not in name} == {n for n in base.tensors if n.endswith(".gate.weight")}
    assert len([name for name in weights if ".lora_" in name]) == 2 * 4 * (4 + 4 * 3)
    assert save.adapter is not None
    assert Path(save.adapter.base_path) == place.base.resolve()
    size = sum(save.tensors[name].nbytes for name in weights)
    assert size < sum(info.nbytes for info in base.tensors.values()) / 2
    records = [json.loads(line) for line in (place.folder / "whole.jsonl").read_text().splitlines()]
    assert any("on 64 weights" in str(record) for record in records), "the log says what is adapted"


def test_an_evaluation_needs_no_flags(place: Workplace) -> None:
    records = map(json.loads, (place.folder / "evaluated.jsonl").read_text().splitlines())
    found = [record["eval_lm_loss"] for record in records if record.get("split") == "valid"]
    assert len(found) == 2
    assert found[0] == found[1]


def test_another_model_is_refused(place: Workplace) -> None:
    assert "holds other weights" in place.refusal
    assert str(place.folder / "touched") in place.refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--lora-alpha": "7"}, r"holds adapters of --lora-rank 4 --lora-alpha 6; give these"),
        ({"--lora-rank": "3"}, r"holds adapters of --lora-rank 4"),
        (
            {"--quantize-base": "nf4"},
            r"holds adapters of --lora-rank 4 --lora-alpha 6, without --quantize-base; give these",
        ),
        ({"--lora-also-train": "*norm*"}, r"--lora-also-train: .* it holds .*gate.weight, which the flags don't name"),
        ({"--lora-targets": "*.self_attn.*"}, r"--lora-targets: .* it holds .*experts"),
    ],
)
def test_other_adapters_are_refused(place: Workplace, change: dict[str, str], message: str) -> None:
    words = place.words("two", 4) + list(LORA)
    for flag, value in change.items():
        at = words.index(flag) if flag in words else len(words)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        words[at:end] = [flag, value]
    with pytest.raises(ConfigError, match=message):
        prepare(parse_flags(words), Process(rank=0, local_rank=0, world_size=1))


def test_a_run_without_adapters_does_not_go_on_with_them(place: Workplace) -> None:
    process = Process(rank=0, local_rank=0, world_size=1)
    with pytest.raises(ConfigError, match="holds adapters: go on with --lora-rank 4 --lora-alpha 6"):
        prepare(parse_flags(place.words("two", 4)), process)


GLOBS: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    "nothing fits": ({"targets": ("*.attention.*",)}, r"--lora-targets \*\.attention\.\*: no weight of the model has such a name; nearest"),
    "a router": ({"targets": ("*.gate.weight",)}, r"can't have an adapter: .* Train it whole with --lora-also-train"),
    "some experts": ({"targets": ("*experts.[0-2].w1*",)}, r"fits expert\.gate of 3 of the 8 experts of layer 0"),
    "both": ({"targets": ("*q_proj*",), "also_train": ("*layers.1*q_proj*",)}, r"trains model\.layers\.1\.self_attn\.q_proj\.weight whole, and"),
}  # fmt: skip


@pytest.mark.parametrize("case", GLOBS)
def test_globs_that_mean_nothing(case: str) -> None:
    fields, message = GLOBS[case]
    with pytest.raises(ConfigError, match=message):
        adapt(tiny_model(), LoraConfig(rank=4, **fields))  # type: ignore[arg-type]


def test_adapters_begin_as_pefts_do() -> None:
    model = adapt(tiny_model(), LoraConfig(rank=4))
    assert isinstance(model, AdaptedModel)
    read = initial_adapters(model, 7)
    a, b = (f"model.layers.2.self_attn.o_proj.lora_{which}.weight" for which in "AB")
    whole = read(a, Rect.whole(model.tensors[a].shape))
    # kaiming_uniform_ with a = sqrt(5), which peft draws A from, is uniform up to one over the root of the inputs.
    reference = torch.empty(4096, 32)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert np.abs(whole).max() <= 32**-0.5 + 1e-7
    assert reference.abs().max().item() == pytest.approx(32**-0.5, rel=1e-3)
    assert whole.std() == pytest.approx(reference.std().item(), rel=0.15)
    assert (read(a, Rect((1, 8), (2, 16))) == whole[1:3, 8:24]).all(), "each rank draws its part of the same matrix"
    assert not read(b, Rect.whole(model.tensors[b].shape)).any()
    assert (read(a, Rect.whole(model.tensors[a].shape)) != initial_adapters(model, 8)(a, Rect.whole((4, 32)))).any()

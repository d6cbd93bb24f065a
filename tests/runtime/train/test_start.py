"""Where a run starts, what it says of it, and how it ends by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeconv.errors import MoeconvError, WriteError
from runtime.checkpoint.folder import try_writing
from runtime.errors import ConfigError
from runtime.job.processes import Process
from runtime.settings.flags import parse_flags
from runtime.sizes import num_parameters, saved_bytes
from runtime.start import prepare
from tests.runtime.launch import ROOT, run_here, steps
from tests.runtime.launch import run as torchrun
from tests.runtime.tiny import make_checkpoint

FLAGS = (
    "--mock-data --tokenizer-type NullTokenizer --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2"
)
SAMPLES = "--train-samples 22 --lr-warmup-samples 8 --lr-decay-samples 16 --log-params-norm --log-num-zeros-in-grad"


def train(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "runtime.train", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


class Place:
    """A checkpoint, and a run that left at iteration 2 and then went on to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny, self.save = folder, make_checkpoint(folder / "tiny"), folder / "run"
        self.words: list[Any] = ["--load", self.tiny, "--save", self.save, "--log-file", folder / "log.jsonl"]
        self.words += [*FLAGS.split(), *SAMPLES.split(), "--manual-gc", "--manual-gc-interval", 2]
        self.first = train(*self.words, "--exit-interval", 2)
        self.second = train(*self.words, "--no-load-optim")
        self.log = steps(folder / "log.jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("start"))


def test_samples_say_how_long_and_how_fast(place: Place) -> None:
    assert place.first.returncode == place.second.returncode == 0, place.first.stderr + place.second.stderr
    assert "--exit-interval 2 divides the iteration: saving after iteration 2 and leaving" in place.first.stdout
    assert list(place.log) == [1, 2, 3, 4, 5]  # 22 samples are five batches of four
    assert [record["learning_rate"] for record in place.log.values()] == pytest.approx([0, 0.005, 0.01, 0.005, 0])


def test_going_on_says_from_where_and_what_is_not_taken(place: Place) -> None:
    assert f"going on from {place.save}/iter_0000002, which this run saved; --load {place.tiny} is not read" in (
        place.second.stdout
    )
    assert "--no-load-optim, --no-load-rng and --finetune are for --load" in place.second.stdout


def test_norm_of_weights_and_zeros_of_the_gradient_are_those_of_the_checkpoint(place: Place) -> None:
    folder = place.save / "iter_0000005"
    tensors = {k: v for file in folder.glob("[de]*.safetensors") for k, v in load_file(file).items()}
    norm = np.sqrt(sum(float(np.square(tensor.astype(np.float64)).sum()) for tensor in tensors.values()))
    assert place.log[5]["params_norm"] == pytest.approx(norm, rel=1e-6)
    # At least the rows of tokens that the batch doesn't have get no gradient.
    rows, width = tensors["model.embed_tokens.weight"].shape
    absent = (rows - 4 * 32) * width
    assert absent <= place.log[5]["num_zeros"] < sum(tensor.size for tensor in tensors.values())


def test_a_run_that_is_done_says_so(place: Place) -> None:
    said = "--train-samples 22 is reached already, at iteration 5: nothing is left to train"
    assert said in run_here(place.words)


def note_of(place: Place, *words: object) -> str:
    given = parse_flags([str(word) for word in (*words, *FLAGS.split(), "--train-iters", 9)])
    return "\n".join(prepare(given, Process())[0].notes)


def test_another_load_than_the_run_began_with_is_refused_or_said(place: Place) -> None:
    other = shutil.copytree(place.tiny, place.folder / "other", dirs_exist_ok=True)
    note = note_of(place, "--load", other, "--save", place.save)
    assert f"WARNING: going on from {place.save}/iter_0000005" in note
    assert f"began from {place.tiny}. To train {other}, give another --save" in note
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"--save .* holds a run of another model"):
        note_of(place, "--load", other, "--save", place.save)


def test_a_run_that_keeps_nothing_is_warned(place: Place) -> None:
    assert "WARNING: without --save, nothing of this run is kept" in note_of(place, "--load", place.tiny)


def test_a_tokenizer_that_is_not_there(place: Place) -> None:
    with pytest.raises(MoeconvError, match="--tokenizer-model /none: no such file"):
        note_of(place, "--load", place.tiny, "--tokenizer-model", "/none")


def test_a_save_folder_is_tried_before_training(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"--save .*file/run: can't be written: Not a directory"):
        try_writing(tmp_path / "file" / "run", 1)
    with pytest.raises(WriteError, match=r"a checkpoint takes 1000000000\.00 GB, .* GB are free"):
        try_writing(tmp_path / "run", 10**18)
    assert list((tmp_path / "run").iterdir()) == []
    words = ["--load", place.tiny, "--save", tmp_path / "file" / "run", *FLAGS.split(), "--train-iters", 1]
    status, output = torchrun(2, words)
    assert status != 0
    assert sum(line.startswith("error: --save") for line in output.splitlines()) == 1, output
    # torchrun's report ends with what is wrong.
    assert "error: --save" in output.splitlines()[-2 if output.splitlines()[-1].startswith("=") else -3], output


@pytest.mark.parametrize(
    ("words", "a_parameter"),
    [
        ([], 12),
        (["--no-save-optim"], 4),
        (["--bf16", "--moments-dtype", "bfloat16"], 10),
        (["--bf16", "--ema-decay", "0.9"], 18),
    ],
)
def test_the_room_that_is_asked_for_is_what_a_save_takes(place: Place, words: list[str], a_parameter: int) -> None:
    given = parse_flags([*words, *FLAGS.split(), "--load", str(place.tiny), "--save", "x", "--train-iters", "9"])
    run, origin = prepare(given, Process())
    found = saved_bytes(run, origin.checkpoint, 1)
    assert found == num_parameters(origin.checkpoint) * a_parameter
    if not words:
        folder = place.save / "iter_0000005"
        tensors = [load_file(path) for path in folder.glob("*.safetensors")]
        assert found == sum(tensor.nbytes for file in tensors for tensor in file.values())


def test_an_unknown_flag_is_one_line_from_one_rank_and_the_last(place: Place) -> None:
    status, output = torchrun(2, ["--load", place.tiny, "--moe-aux-loss", 1])
    assert status != 0
    assert sum(line.startswith("error: unknown flag --moe-aux-loss; nearest:") for line in output.splitlines()) == 1
    assert "error: unknown flag --moe-aux-loss" in output.rstrip("\n =").splitlines()[-1], output


def test_minutes_end_a_run(place: Place) -> None:
    words = ["--load", place.tiny, "--save", place.folder / "short", *FLAGS.split(), "--train-iters", 9]
    printed = run_here([*words, "--exit-duration-in-mins", 0.00001])
    assert "--exit-duration-in-mins 1e-05 are over: saving after iteration 1 and leaving" in printed

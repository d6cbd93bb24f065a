"""The tutorial shows what its commands print, and what it leaves is read by the format's own reader and by torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import msgspec
import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from moeconv.io import trainer_file
from tests.docs import tutorial
from tests.docs.reader import read
from tests.docs.test_format import as_stored, stored
from tests.docs.tutorial import PAGE, masked


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tutorial leaves; `tutorial.made` in it is the page with what was printed now."""
    folder = tmp_path_factory.mktemp("day")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("OMP_NUM_THREADS", "1")
        made = tutorial.run(PAGE.read_text(encoding="utf8"))
    (folder / "tutorial.made").write_text(made, encoding="utf8")
    return folder


def test_the_outputs_are_what_is_printed(day: Path) -> None:
    """`python -m tests.docs.tutorial` writes them anew."""
    made, page = (day / "tutorial.made").read_text(encoding="utf8"), PAGE.read_text(encoding="utf8")
    assert masked(made).splitlines() == masked(page).splitlines()


def test_the_loss_falls_and_the_page_says_so(day: Path) -> None:
    losses = [
        float(line.split("lm loss ")[1].split()[0]) for line in PAGE.read_text().splitlines() if "lm loss" in line
    ]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert (day / "report.html").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_trained_checkpoint_is_read_with_its_optimizer_state(day: Path) -> None:
    """Weights as the safetensors library reads their export, everything as torch's distributed checkpoint reads the shards."""
    weights = {name: value for name, value in read(day / "run" / "latest").items() if not name.startswith("optimizer.")}
    assert as_stored(weights) == stored(day / "mixtral-trained")
    run = day / "run" / "iter_0000012"
    files = json.loads((run / "moeconv.json").read_text())["files"]
    assert any("-dp1" in name for name in files), "the distributed optimizer splits states over data-parallel ranks"
    found = read(run)
    assert {n.split(".")[1] for n in found if n.startswith("optimizer.")} == {"master", "exp_avg", "exp_avg_sq"}
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    state = {name: torch.zeros(array.shape, dtype=kinds[kind]) for name, (kind, array) in found.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(run)), no_dist=True)
    for name, (_, array) in found.items():
        assert state[name].view(torch.uint8).numpy().tobytes() == array.tobytes(), name
    trainer = json.loads((run / "trainer.json").read_text())
    assert trainer.keys() == {field.encode_name for field in msgspec.structs.fields(trainer_file._Trainer)}

"""`moeconv eval`: losses that are transformers', bytes that are the text's, from any form of a checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, MixtralForCausalLM

from cli.main import main
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from runtime.data.token_bytes import token_bytes
from tests.runtime.tiny import make_checkpoint
from tests.runtime.words import real_text

ROOT = Path(__file__).parents[2]
LENGTH = 64


def moeconv(*words: object) -> str:
    """Run a command in this process, which must succeed; give what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(word) for word in words], standalone_mode=False)
    return out.getvalue()


class Place:
    """A checkpoint, two texts of several documents, and what `moeconv eval` says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny = folder, make_checkpoint(folder / "tiny")
        text = real_text()
        self.texts = {"first": text[:6000], "se cond": text[9000:17000] + " d\u00e9j\u00e0 vu \u4e2d\u6587 \U0001f600"}
        for name, words in self.texts.items():
            lines = [json.dumps({"text": words[begin : begin + 700]}) for begin in range(0, len(words), 700)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        self.flags = ["--seq-length", LENGTH, "--micro-batch-size", 4, "--data-cache-path", folder / "cache"]
        self.data = ["--data", f"one={folder / 'first.jsonl'}", folder / "se cond.jsonl"]
        self.result = self.eval(self.tiny)

    def eval(self, checkpoint: Path, *words: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(moeconv("eval", checkpoint, *self.data, *self.flags, "--json", *words))
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("eval"))


def test_losses_are_those_of_transformers_and_bytes_those_of_the_text(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.tiny)
    model = MixtralForCausalLM.from_pretrained(place.tiny, dtype=torch.float32)
    names = [found["name"] for found in place.result["sets"]]
    assert names == ["one", "se cond.jsonl"]
    for found, words in zip(place.result["sets"], place.texts.values(), strict=True):
        documents = [words[begin : begin + 700] for begin in range(0, len(words), 700)]
        ids = [number for document in documents for number in [*tokenizer(document)["input_ids"], 1]]
        rows = torch.tensor(
            [ids[begin : begin + LENGTH + 1] for begin in range(0, len(ids) - LENGTH, LENGTH)], dtype=torch.int64
        )
        with torch.no_grad():
            logits = model(input_ids=rows[:, :-1]).logits
        loss = float(torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), rows[:, 1:].flatten()))
        num_bytes = len(tokenizer.decode(rows[:, 1:].flatten(), skip_special_tokens=True).encode())
        assert found["tokens"] == rows[:, 1:].numel()
        assert found["loss"] == pytest.approx(loss, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert found["bytes"] == num_bytes
        assert found["bits_per_byte"] == pytest.approx(loss * rows[:, 1:].numel() / math.log(2) / num_bytes, rel=1e-6)


def test_shards_on_two_ranks_of_torchrun_have_the_same_losses(place: Place) -> None:
    sharded = place.folder / "sharded"
    write_sharded(open_checkpoint(place.tiny), sharded, Degrees(tp=2, ep=2, etp=1), Options())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "cli", "eval", sharded, *place.data, *place.flags, "--json"]
    command += ["--expert-model-parallel-size", 2, "--fully-shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    got, want = json.loads(done.stdout)["sets"], place.result["sets"]
    for mine, theirs in zip(got, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert (mine["tokens"], mine["bytes"]) == (theirs["tokens"], theirs["bytes"])


def test_a_table_for_people_and_what_is_unknown(place: Place) -> None:
    printed = moeconv("eval", place.tiny, "--mock-data", "--seq-length", LENGTH, "--eval-iters", 2)
    head, row, _, note = printed.splitlines()
    assert head.split() == ["loss", "perplexity", "bits/byte", "tokens", "bytes", "seconds"]
    assert row.split()[0] == "valid"
    assert "128" in row.split()
    assert note.startswith("bits/byte: no tokenizer tells")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "CKPT comes first"),
        (["ckpt"], "--data is missing"),
        (["ckpt", "--data", "x", "--sequ-length", "3"], "unknown flag --sequ-length; nearest: --seq-length"),
    ],
)
def test_command_lines_that_can_not_be_meant(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["eval", *words])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_bytes_of_sentencepiece_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "\u2581", "a", "b", "\u2581a", "\u4e2d"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, fuse_unk=True)
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    table = token_bytes(tokenizer)
    assert table is not None
    for text in (" ab a", "b\u4e2d \u00e9", "\U0001f600a"):
        ids = tokenizer(text)["input_ids"]
        assert table[ids].sum() == len(text.encode())
    assert (table[:2] == 0).all()
    assert np.count_nonzero(table[2:258] == 1) == 256
    inner.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner)) is None

"""Rows of conversations: whole, each once an epoch, and the loss that transformers computes of each alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from runtime.data.batch import IGNORED_LABEL
from runtime.data.config import DataConfig
from runtime.data.errors import DataError
from runtime.data.loader import DataSource
from runtime.data.packing import permutation
from runtime.data.rows import ConversationRows, pack
from runtime.data.show import print_sample
from runtime.data.stream import TokenStream
from runtime.data.summary import describe_data, row_report
from runtime.errors import ConfigError
from runtime.settings.flags import parse_flags
from tests.runtime.data.chats import CHATML, Record, make_chats, with_template, without_marks
from tests.runtime.model.hub import hub_tensors
from tests.runtime.model.test_transformers import make_engine, make_model, relative
from tests.runtime.words import VOCAB_SIZE

COUNT = 41
SEQ_LENGTH = 600


class Place:
    """A tokenizer without marks in its template, conversations in a file, and what transformers makes of them."""

    def __init__(self, tokenizer_folder: Path, texts: list[str], folder: Path) -> None:
        self.folder = folder
        self.tokenizer = with_template(tokenizer_folder, without_marks(CHATML), folder / "tokenizer")
        self.records = make_chats(texts, COUNT)
        self.path = folder / "chats.jsonl"
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        self.wanted = [self.masked(tokenizer, record) for record in self.records]

    @staticmethod
    def masked(tokenizer: Any, record: Record) -> tuple[list[int], list[int]]:
        found = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
        )  # fmt: skip
        ids, mask = found["input_ids"], found["assistant_masks"]
        return list(ids), [token if mark else IGNORED_LABEL for token, mark in zip(ids, mask, strict=True)]

    def source(self, **settings: Any) -> DataSource:
        given = {"seq_length": SEQ_LENGTH, "vocab_size": VOCAB_SIZE, "split": (1,), "finetune_data": (str(self.path),)}
        cache = {"data_cache_path": self.folder / "cache"}
        return DataSource(DataConfig(**{**given, **cache, **settings}), self.tokenizer)


@pytest.fixture(scope="module")
def place(tokenizer_folder: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tokenizer_folder, texts, tmp_path_factory.mktemp("rows"))


def conversations(data: DataSource, first: int, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and labels of each conversation in some samples, as transformers aligns them; padding is left out."""
    found = []
    for index in range(first, first + count):
        [batch] = data.loader(data.samples("train")).global_batch(index, 1)
        assert batch.document_ids is not None
        assert batch.position_ids is not None
        ids, labels = batch.tokens[0], torch.cat([torch.tensor([IGNORED_LABEL]), batch.labels[0]])
        numbers = batch.document_ids[0]
        for number in range(int(numbers.max()) + 1):
            [places] = (numbers == number).nonzero(as_tuple=True)
            assert batch.position_ids[0][places].tolist() == list(range(len(places)))
            last = int(places[-1])
            if last + 1 == len(ids) and labels[-1] != IGNORED_LABEL:  # the last of a full row is a label only
                found.append(((*ids[places].tolist(), int(labels[-1])), (*labels[places].tolist(), int(labels[-1]))))
            elif ids[places].any():
                found.append((tuple(ids[places].tolist()), tuple(labels[places].tolist())))
    return found


def test_every_conversation_once_an_epoch_whole_and_with_its_mask(place: Place) -> None:
    data = place.source()
    samples = data.samples("train")
    wanted = sorted((tuple(ids), tuple(labels)) for ids, labels in place.wanted)
    assert max(len(ids) for ids, _ in wanted) <= SEQ_LENGTH
    first = conversations(data, 0, samples.num_samples)
    second = conversations(data, samples.num_samples, samples.num_samples)
    assert sorted(first) == sorted(second) == wanted
    assert first != second, "each epoch has an order of its own"
    assert first == conversations(place.source(), 0, samples.num_samples), "the same again"
    assert samples.digest() != place.source(seed=5).samples("train").digest()


def test_what_the_log_says(place: Place) -> None:
    data = place.source()
    tokens = sum(len(ids) for ids, _ in place.wanted)
    trained = sum(label != IGNORED_LABEL for _, labels in place.wanted for label in labels)
    report = row_report(data.samples("train"))
    assert report is not None
    assert (report.conversations, report.tokens, report.trained) == (COUNT, tokens, trained)
    assert report.padding == 1 - tokens / (report.rows * (SEQ_LENGTH + 1)) < 0.1
    line = describe_data(data, ["train"], train_samples=2 * report.rows, train_steps=2, batch_sizes=[report.rows])
    assert f"{COUNT} conversations, {tokens:,} tokens, {trained:,} of them trained ({trained / tokens:.1%})" in line
    assert f"{report.rows} samples of {SEQ_LENGTH}, {report.padding:.2%} padding | 2 epochs in 2 steps" in line


def test_conversations_that_nobody_uses_are_said(place: Place) -> None:
    data = place.source(split=(31, 10))
    assert "--split 31,10 keeps 24.4% of the conversations from training" in describe_data(data, ["train"])
    assert "--split" not in describe_data(data, ["train", "valid"])


def test_long_conversations_are_cut_or_left_out(place: Place) -> None:
    lengths = [len(ids) for ids, _ in place.wanted]
    length = sorted(lengths)[COUNT // 2]
    cut = place.source(seq_length=length - 1)
    samples = cut.samples("train")
    wanted = [(tuple(ids[:length]), tuple(labels[:length])) for ids, labels in place.wanted]
    kept = [item for item in wanted if any(label != IGNORED_LABEL for label in item[1])]
    report = row_report(samples)
    assert report is not None
    # The last token of a row is no input: where it isn't learned either, nobody sees it.
    seen = [tuple(x[: length - (len(x) == length and item[1][-1] < 0)] for x in item) for item in kept]
    assert sorted(conversations(cut, 0, samples.num_samples)) == sorted(seen)
    longer = sum(len(ids) > length for ids, labels in place.wanted if any(label >= 0 for label in labels[:length]))
    assert report.cut == longer > 0
    assert report.untrained == COUNT - len(kept)
    assert f"{report.cut} cut to a sample (" in describe_data(cut, ["train"])
    dropped = place.source(seq_length=length - 1, drop_long=True)
    whole = [(tuple(ids), tuple(labels)) for ids, labels in place.wanted if len(ids) <= length]
    assert sorted(conversations(dropped, 0, dropped.samples("train").num_samples)) == sorted(whole)
    assert f", {COUNT - len(whole)} longer than a sample left out" in describe_data(dropped, ["train"])
    with pytest.raises(DataError, match=r"none of the 41 conversations has a learned token within --seq-length 8"):
        place.source(seq_length=8).samples("train")


def test_validation_by_conversations(place: Place) -> None:
    data = place.source(split=(31, 10))
    train, valid = data.samples("train"), data.samples("valid")
    assert (train.num_documents, valid.num_documents) == (31, 10)
    assert sorted(conversations(data, 0, train.num_samples)) == sorted(
        (tuple(i), tuple(x)) for i, x in place.wanted[:31]
    )
    assert not data.has("test")
    own = place.source(split=None, finetune_valid_data=(str(place.path),))
    assert (own.samples("train").num_documents, own.samples("valid").num_documents) == (COUNT, COUNT)
    assert [name for name, _ in own.sets("valid")] == ["valid"]
    with pytest.raises(DataError, match=r"gives the valid part none of its 41 conversations.*--finetune-valid-data"):
        place.source(split=(1, 0)).samples("valid")


def test_blends_with_weights(place: Place) -> None:
    words = ("0.25", str(place.path), "0.75", str(place.path))
    data = place.source(finetune_data=words)
    report = row_report(data.samples("train"))
    assert report is not None
    assert report.conversations == 2 * COUNT
    assert conversations(data, 0, 8)
    rows = report.rows // 2
    line = describe_data(data, ["train"], train_samples=4 * rows)
    assert f"{rows:,} samples, 1 epochs, {place.path}: {3 * rows:,} samples, 3 epochs" in line


def test_the_loss_is_that_of_each_conversation_alone_in_transformers(place: Place) -> None:
    """Written out: the mean over all learned tokens of what each conversation by itself gives."""
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024}
    model = make_model("mixtral", **options)
    used = place.wanted[:9]
    path = place.folder / "nine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in place.records[:9]))
    losses, count = [], 0
    for ids, labels in used:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))
        count += sum(label != IGNORED_LABEL for label in labels[1:])
    loss = torch.stack(losses).sum() / count
    loss.backward()  # type: ignore[no-untyped-call]

    data = place.source(finetune_data=(str(path),))
    samples = data.samples("train")
    assert 1 < samples.num_samples < 9
    engine = make_engine(model)
    batches = data.loader(samples).global_batch(0, samples.num_samples)
    assert engine.evaluate(batches) == pytest.approx(loss.item(), rel=1e-6)
    assert sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches) == count
    assert engine.train_step(batches).lm_loss == pytest.approx(loss.item(), rel=1e-6)
    want = hub_tensors(model, lambda p: p.grad)
    errors = {item.name: relative(item.tensor, want[item.name]) for item in engine.gradients()}
    assert errors.keys() == want.keys()
    assert max(errors.values()) < 1e-5, errors


def test_a_sample_as_people_see_it(place: Place) -> None:
    data = place.source()
    plain, colour = io.StringIO(), io.StringIO()
    print_sample(data, Console(file=plain, soft_wrap=True))
    print_sample(data, Console(file=colour, force_terminal=True, color_system="standard", soft_wrap=True))
    [first, *_] = conversations(data, 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(place.tokenizer)
    learned = [
        tokenizer.decode([token for token, label in zip(*part, strict=True) if label != IGNORED_LABEL])
        for part in conversations(data, 0, 1)
    ]
    assert (
        f"--- document 1: {len(first[0])} tokens, {sum(x != IGNORED_LABEL for x in first[1])} learned"
        in plain.getvalue()
    )
    # What stands in brackets is what is learned.
    shown = "".join(
        part.split("]]")[0] for part in plain.getvalue().split("(without colour: [[ ]])")[1].split("[[")[1:]
    )
    assert shown == "".join(learned)
    assert "\x1b[" in colour.getvalue()
    assert "[[" not in colour.getvalue().split("(without colour")[1][10:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": ("a",)}, "--data-path excludes --finetune-data"),
        ({"mock_data": True}, "--mock-data excludes --finetune-data"),
        ({"data_order": "megatron"}, "--data-order megatron is for text"),
        ({"eod_mask_loss": True}, "--eod-mask-loss with --finetune-data"),
        ({"split": (1,), "finetune_valid_data": ("b",)}, "--finetune-valid-data names the validation part itself"),
        ({"finetune_data": (), "data_path": ("a",), "drop_long": True}, "--drop-long is for conversations"),
        (
            {"finetune_data": (), "data_path": ("a",), "assistant_turns": "last"},
            "--assistant-turns is for conversations",
        ),
        ({"finetune_data": ("0.3", "a", "b")}, "--finetune-data 0.3 a b: 0.3 is no path"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    given = {"seq_length": 8, "vocab_size": 9, "finetune_data": ("a",)} | settings
    with pytest.raises(ConfigError, match=message):
        DataConfig(**given).blends()


def test_files_that_hold_no_conversations(place: Place, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "b.bin")
    for name, kind in (("a.txt", "plain text"), ("b.bin", "token ids")):
        with pytest.raises(DataError, match=rf"{name}: is {kind}, which holds no conversations"):
            place.source(finetune_data=(str(tmp_path / name),)).prepare()


def test_megatrons_flag_has_advice() -> None:
    with pytest.raises(ConfigError, match="--sft: give the conversations with --finetune-data instead of --data-path"):
        parse_flags(["--load", "x", "--sft"])


@pytest.mark.parametrize("capacity", [10, 57])
def test_packing_loses_nothing_and_wastes_little(capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(1, capacity + 1, 500)
    row_of = pack(lengths, capacity, permutation(len(lengths), 1))
    filled = np.bincount(row_of, weights=lengths)
    assert filled.max() <= capacity
    assert filled.min() > 0
    # Best-fit decreasing needs at most 11/9 of the best and one more, which is at least either of these.
    least = max(np.ceil(lengths.sum() / capacity), (lengths > capacity / 2).sum())
    assert len(filled) <= 11 / 9 * least + 1
    other = pack(lengths, capacity, permutation(len(lengths), 2))
    assert np.array_equal(np.sort(np.bincount(other, weights=lengths)), np.sort(filled))
    assert not np.array_equal(other, row_of)


def test_marks_are_counted_in_stretches(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.source()
    samples = data.samples("train")
    assert isinstance(samples, ConversationRows)
    stream: TokenStream = samples._stream
    ends = stream.document_ends(0, 1)
    starts = np.concatenate([[0], ends[:-1]])
    cut = np.minimum(ends, starts + 50)
    want = [int((stream.files[0].tokens[a:b] & 1).sum()) for a, b in zip(starts, cut, strict=True)]
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr("runtime.data.stream._COUNTED", size)
        assert stream.count_marks(starts, cut).tolist() == want
    assert stream.count_marks(starts, starts).tolist() == [0] * COUNT

"""From the settings of a run to its batches: splits, blends, caches, prefetching, going on, what is said at start."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from runtime.data.batch import Batch
from runtime.data.blend import Blend, absolute_words, parse_blend
from runtime.data.blended import BlendedSamples
from runtime.data.config import DataConfig
from runtime.data.errors import DataError
from runtime.data.job import prepare_data
from runtime.data.loader import DataSource, Loader
from runtime.data.prefetch import Prefetcher
from runtime.data.prepare import PrepareProgress
from runtime.data.summary import describe_data, describe_progress
from runtime.errors import ConfigError
from runtime.ops.documents import document_bounds
from runtime.settings.flags import parse_flags
from tests.runtime.data.files import json_lines, write_tokens
from tests.runtime.words import VOCAB_SIZE

VOCAB = 1000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Token files whose ids say which file they are from: a below 300, b below 600, c below 900."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    for low, (name, count) in zip((2, 300, 600), (("a", 40), ("b", 20), ("c", 30)), strict=True):
        documents = [random.integers(low, low + 290, random.integers(5, 40)).tolist() for _ in range(count)]
        write_tokens(folder / f"{name}.bin", documents, np.dtype(np.uint16))
    write_tokens(folder / "tiny.bin", [[1, 2, 3]], np.dtype(np.uint16))
    return {path.stem: str(path.with_suffix("")) for path in folder.glob("*.bin")}


def config(**settings: Any) -> DataConfig:
    return DataConfig(**{"seq_length": 16, "vocab_size": VOCAB, **settings})


def source(**settings: Any) -> DataSource:
    return DataSource(config(**settings), Path())


def test_split_is_by_documents_of_each_path(corpora: dict[str, str]) -> None:
    data = source(data_path=(corpora["a"], corpora["b"]), split=(8, 1, 1))
    train, valid, test = (data.samples(split) for split in ("train", "valid", "test"))
    assert [s.num_documents for s in (train, valid, test)] == [32 + 16, 4 + 2, 4 + 2]
    for samples in (train, valid, test):  # each part has documents of both
        seen = np.concatenate([samples.sample(i) for i in range(samples.num_samples + 1)])
        assert seen.min() < 300 <= seen.max()


def test_a_single_document_is_cut_by_tokens(tmp_path: Path) -> None:
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = source(data_path=(str(tmp_path / "a.bin"),), split=(3, 1), bare_dtype="uint16")
    assert [data.samples(split).num_tokens for split in ("train", "valid")] == [150, 50]
    assert not data.has("test")
    with pytest.raises(DataError, match="--split 3,1 gives the test part none of its 1 documents"):
        data.samples("test")


def test_a_part_without_documents_names_the_remedy(corpora: dict[str, str]) -> None:
    data = source(data_path=(corpora["a"],), split=(99990, 8, 2))
    assert (data.has("train"), data.has("valid")) == (True, False)
    with pytest.raises(
        DataError, match=r"--split 99990,8,2 gives the valid part none of its 40 documents.*--valid-data-path"
    ):
        data.samples("valid")
    own = source(train_data_path=(corpora["a"],), valid_data_path=(corpora["tiny"],))  # the advice, obeyed
    valid = own.samples("valid")
    assert (valid.num_tokens, valid.num_samples) == (3, 1)
    assert valid.sample(0).tolist() == [1, 2, 3] * 5 + [1, 2]
    with pytest.raises(ConfigError, match="--test-data-path"):
        own.samples("test")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), None),
        (("a",), Blend(("a",))),
        (("a", "b"), Blend(("a", "b"))),
        (("0.3", "a", "0.7", "b"), Blend(("a", "b"), (0.3, 0.7))),
        (("1", "a"), Blend(("a",), (1.0,))),
        ((" 2 ", " a "), Blend(("a",), (2.0,))),
    ],
)
def test_words_of_a_blend(words: tuple[str, ...], expected: Blend | None) -> None:
    assert parse_blend(words, "--data-path") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("0.3", "a", "b"), "0.3 is no path"),
        (("0.3", "a", "x", "b"), "x stands where a weight is expected"),
        (("0", "a", "1", "b"), "weight 0; expected more than 0"),
        (("nan", "a"), "weight nan"),
        (("-1", "a"), "weight -1"),
    ],
)
def test_words_that_are_no_blend(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_blend(words, "--data-path")


def test_a_weighted_blend_deals_by_weight_and_sources_repeat(corpora: dict[str, str]) -> None:
    samples = source(data_path=("3", corpora["a"], "1", corpora["b"]), split=(1,)).samples("train")
    assert isinstance(samples, BlendedSamples)
    rows = [samples.sample(i) for i in range(400)]
    assert all((row < 300).all() or (row >= 300).all() for row in rows)  # no sample of two sources
    assert sum(int(row[0] < 300) for row in rows) == 300 == samples.counts(400)[0]
    assert samples.epochs(400) == pytest.approx(
        max(300 * 16 / samples.parts[0].num_tokens, 100 * 16 / samples.parts[1].num_tokens)
    )
    assert samples.sample(10**6).shape == (17,)  # far on: no list of all samples is made


def test_files_of_arguments(corpora: dict[str, str], tmp_path: Path) -> None:
    blend = f"0.25 {corpora['a']}\n0.75 {corpora['b']}\n"
    (tmp_path / "args.txt").write_text(blend)
    direct = source(data_path=tuple(blend.split()), split=(9, 1))
    named = source(data_args_path=tmp_path / "args.txt", split=(9, 1))
    assert named.fingerprint() == direct.fingerprint()
    table = {"train": blend.split(), "valid": corpora["c"], "test": None}
    (tmp_path / "args.json").write_text(json.dumps(table))
    own = source(per_split_data_args_path=tmp_path / "args.json")
    assert own.samples("valid").num_documents == 30
    assert not own.has("test")
    for content, message in (
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"dev": []}', "has 'dev'"),
        ("{}", "names no data"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises((ConfigError, DataError), match=message):
            source(per_split_data_args_path=tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"absent\.txt: can't be read"):
        source(data_args_path=tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no data: name files or folders with --data-path"),
        ({"data_path": ("a",), "train_data_path": ("b",)}, "--data-path excludes --train-data-path"),
        ({"data_path": ("a",), "data_args_path": Path("b")}, "--data-path excludes --data-args-path"),
        ({"train_data_path": ("a",), "split": (1, 1)}, "--split divides --data-path"),
        ({"data_path": ("a",), "split": (0, 0)}, "not all 0"),
        ({"data_path": ("a",), "split": (1, 1, 1, 1)}, "up to three numbers"),
        ({"data_path": ("a",), "multiple_validation_sets": True}, "--valid-data-path"),
        ({"data_path": ("a",), "skip_bad_lines": -1}, "--skip-bad-lines is -1"),
        ({"data_path": ("a",), "bare_dtype": "float32"}, "--bare-dtype is 'float32'"),
    ],
)
def test_settings_that_disagree(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_validation_sets_of_their_own(corpora: dict[str, str]) -> None:
    paths = {"train_data_path": (corpora["a"],), "valid_data_path": (corpora["b"], corpora["c"])}
    data = source(**paths, multiple_validation_sets=True)
    assert [(name, s.num_documents) for name, s in data.sets("valid")] == [("b", 20), ("c", 30)]
    assert [(name, s.num_documents) for name, s in source(**paths).sets("valid")] == [("valid", 50)]
    assert [name for name, _ in data.sets("train")] == ["train"]


def batches_equal(left: list[Batch], right: list[Batch]) -> bool:
    fields = [field.name for field in dataclasses.fields(Batch)]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in fields]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


BLENDS: dict[str, dict[str, Any]] = {
    "one": {"data_path": ("a",)},
    "row": {"data_path": ("a", "b", "c")},
    "weighted": {"data_path": ("0.2", "a", "0.5", "b", "0.3", "c")},
    "masked": {"data_path": ("0.5", "a", "0.5", "b"), "reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    "megatron": {"data_path": ("0.5", "a", "0.5", "b"), "data_order": "megatron"},
}  # fmt: skip


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_resumed_run_takes_the_batches_of_the_uninterrupted(
    corpora: dict[str, str], name: str, num_workers: int
) -> None:
    """Also under another data-parallel degree: together the ranks have the same samples."""
    settings = {**BLENDS[name], "data_path": tuple(corpora.get(word, word) for word in BLENDS[name]["data_path"])}
    masks = {key: settings.get(key, False) for key in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")}

    def loader(dp_rank: int = 0, dp_size: int = 1) -> Prefetcher:
        data = DataSource(config(**settings, split=(1,), eod_token_id=7), Path(), (12 * 8, None, None))
        made = Loader(
            samples=data.samples("train"), micro_batch_size=2, dp_rank=dp_rank, dp_size=dp_size, eod=data.eod(), **masks
        )
        return Prefetcher(made, num_workers=num_workers)

    whole = loader()
    uninterrupted = [whole.global_batch(8 * step, 8) for step in range(12)]
    resumed = loader()
    assert all(batches_equal(resumed.global_batch(8 * step, 8), uninterrupted[step]) for step in range(7, 12))
    ranks = [loader(rank, 2) for rank in range(2)]
    for step in (7, 8):
        parts = [rank.global_batch(8 * step, 8) for rank in ranks]
        together = [batch for pair in zip(*parts, strict=True) for batch in pair]
        assert batches_equal(together, uninterrupted[step])
    for prefetcher in (whole, resumed, *ranks):
        prefetcher.close()


class SlowSamples:
    """Takes a while for each sample, and counts them."""

    num_samples, num_tokens, num_documents = 10**9, 10**9, 1

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, index: int) -> Any:
        self.asked.append(index)
        time.sleep(0.02)
        if index == 99:
            raise DataError("broken")
        return np.full(5, index)


def test_batches_are_ready_before_they_are_asked_for() -> None:
    samples: Any = SlowSamples()
    loader = Prefetcher(Loader(samples=samples, micro_batch_size=2, dp_rank=0, dp_size=1), num_workers=2)
    loader.global_batch(0, 4)
    assert loader.wait_seconds > 0.05
    waits = []
    for step in range(1, 6):
        time.sleep(0.15)  # the step computes
        [first, second] = loader.global_batch(4 * step, 4)
        waits.append(loader.wait_seconds)
        assert [first.tokens[0, 0], second.tokens[1, 0]] == [4 * step, 4 * step + 3]
    assert sorted(waits)[2] < 0.01
    # The size changes (a batch ramp-up), then the place: what was read ahead is dropped.
    assert loader.global_batch(24, 6)[2].tokens[1, 0] == 29
    assert loader.global_batch(500, 4)[0].tokens[0, 0] == 500
    before = len(samples.asked)
    assert loader.global_batch(900, 4, limit=902)[0].tokens[0, 0] == 900
    loader.close()
    time.sleep(0.3)
    assert max(samples.asked[before:]) <= 901  # nothing behind the limit
    errors = Prefetcher(Loader(samples=samples, micro_batch_size=2, dp_rank=0, dp_size=1), num_workers=1)
    with pytest.raises(DataError, match="broken"):
        errors.global_batch(98, 2)
    errors.close()


def test_text_is_tokenized_once_and_follows_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    text, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    text.write_bytes(json_lines(["one two"] * 30))

    def open_it(**settings: Any) -> DataSource:
        made = DataConfig(
            data_path=(str(text),), split=(1,), seq_length=8, vocab_size=VOCAB_SIZE, data_cache_path=cache, **settings
        )
        return DataSource(made, tokenizer_folder)

    first = open_it().samples("train").num_tokens
    open_it().samples("train")
    assert len(list(cache.glob("*.bin"))) == 1
    assert open_it(append_eod=False).samples("train").num_tokens == first - 30
    text.write_bytes(json_lines(["one two three"] * 30))
    assert open_it().samples("train").num_tokens > first
    assert len(list(cache.glob("*.bin"))) == 3
    assert not [path for path in cache.iterdir() if path.suffix in (".parts", ".lock", ".partial")]
    with pytest.raises(DataError, match="384 tokens, the model 100; name the model's own with --tokenizer-model"):
        DataSource(dataclasses.replace(open_it().config, vocab_size=100), tokenizer_folder).samples("train")
    text.write_bytes(json_lines(["new"] * 30))
    with pytest.raises(DataError, match="384 tokens, the model 100"):
        DataSource(dataclasses.replace(open_it().config, vocab_size=100), tokenizer_folder).samples("train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="name a folder with --data-cache-path"):
        DataSource(dataclasses.replace(open_it().config, data_cache_path=tmp_path / "file"), tokenizer_folder).prepare()


def test_end_of_document_token(corpora: dict[str, str], tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = {"data_path": (corpora["a"],), "seq_length": 16, "vocab_size": VOCAB}
    assert DataSource(DataConfig(**settings), tokenizer_folder).eod() is None
    masked = DataConfig(**settings, eod_mask_loss=True)
    assert DataSource(masked, tokenizer_folder).eod() == 1
    assert DataSource(dataclasses.replace(masked, eod_token_id=9), tokenizer_folder).eod() == 9
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="no end-of-sequence token; name one with --eod-token-id"):
        DataSource(masked, tmp_path / "tokenizer.json").eod()


def test_documents_restart_where_files_say_so(corpora: dict[str, str]) -> None:
    """Token files without an end-of-document token: the index has the bounds."""
    data = source(
        data_path=(corpora["a"],), split=(1,), reset_attention_mask=True, reset_position_ids=True, eod_token_id=999
    )
    loader = Loader(
        samples=data.samples("train"), micro_batch_size=3, dp_rank=0, dp_size=1, eod=999, reset_attention_mask=True, reset_position_ids=True
    )  # fmt: skip
    [batch] = loader.global_batch(0, 3)
    assert batch.document_ids is not None
    assert batch.position_ids is not None
    for row in range(3):
        _, begins = data.samples("train").sample_with_begins(row)
        expected = np.zeros(16, int)
        for place in begins:
            expected[place:] += int(0 < place < 16)
        assert batch.document_ids[row].tolist() == expected.tolist()
        lengths = [len(list(group)) for _, group in itertools.groupby(expected)]
        assert batch.position_ids[row].tolist() == [n for length in lengths for n in range(length)]
    starts, lengths = document_bounds(batch.document_ids)
    assert {0, 16, 32} <= set(starts.tolist())
    assert len(starts) == sum(int(row.max()) + 1 for row in batch.document_ids)
    assert (starts + lengths).tolist() == [*starts[1:].tolist(), 48]


def test_what_is_said_at_start(corpora: dict[str, str], tmp_path: Path, tokenizer_folder: Path) -> None:
    data = source(train_data_path=("0.5", corpora["a"], "0.5", corpora["b"]), valid_data_path=(corpora["tiny"],))
    text = describe_data(data, ["train", "valid"], train_samples=400, train_steps=50, batch_sizes=[8])
    train, valid = text.splitlines()
    tokens = data.samples("train").num_tokens
    assert train.startswith(f"train data: 60 documents, {tokens:,} tokens, ")
    assert "epochs in 50 steps of 128 tokens" in train
    assert f"{corpora['a']}: 200 samples, " in train
    assert "fewer tokens than one sample takes: they are repeated" in valid
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(["one", "", "two"]) + b"{bad\n")
    (folder / "b.png").write_bytes(b"\x89PNG")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    made = DataConfig(
        data_path=(str(folder),), split=(1,), seq_length=2, vocab_size=VOCAB_SIZE, data_cache_path=tmp_path / "cache",
        tokenizer_model=tmp_path / "tokenizer.json", skip_bad_lines=1,
    )  # fmt: skip
    text = describe_data(DataSource(made, Path()), ["train"], train_samples=1)
    for part in (
        "b.png: is a PNG image",
        "1 bad lines (the first: ",
        "line 4: not JSON",
        "1 documents without text",
        "no mark between documents",
    ):
        assert part in text


def test_progress_in_words() -> None:
    text = describe_progress(PrepareProgress(10**9, 4 * 10**9, 250_000_000, 1.5e6, 5e6))
    assert text == "tokenizing: 25.0% of 4.00 GB, 250 M tokens, 1.5 M tokens/s, 10 min left"
    assert "waiting" in describe_progress(PrepareProgress(0, 0, 0, 0.0, 0.0, waiting=True))


def test_ranks_meet_without_a_collective_and_share_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    """One rank takes longer than any timeout of the store; a bad line reaches all."""
    text = tmp_path / "a.jsonl"
    text.write_bytes(json_lines(["one two"] * 9))

    def job(lines: bytes) -> list[str]:
        text.write_bytes(lines)
        store = dist.HashStore()  # type: ignore[attr-defined]
        said: list[str] = []

        def rank(number: int) -> None:
            made = DataConfig(
                data_path=(str(text),),
                split=(1,),
                seq_length=8,
                vocab_size=VOCAB_SIZE,
                data_cache_path=tmp_path / "cache",
            )
            data = DataSource(made, tokenizer_folder)
            if number == 1:
                time.sleep(1.0)
            try:
                prepare_data(data, store, 3, None)
                said.append("ready")
            except DataError as error:
                said.append(str(error))

        ranks = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
        for thread in ranks:
            thread.start()
        time.sleep(0.5)
        assert said == []
        for thread in ranks:
            thread.join(30)
        return said

    assert job(json_lines(["one two"] * 9)) == ["ready"] * 3
    for message in job(json_lines(["one"]) + b"{\n"):
        assert "a.jsonl, line 2: not JSON" in message


def test_fingerprint_follows_what_training_sees(corpora: dict[str, str]) -> None:
    def fingerprint(*paths: str, **settings: Any) -> str:
        return source(data_path=tuple(corpora.get(path, path) for path in paths), split=(1,), **settings).fingerprint()

    assert fingerprint("a") == fingerprint("a")
    ways = [
        fingerprint("a"), fingerprint("b"), fingerprint("a", seed=2), fingerprint("a", seq_length=9), fingerprint("a", "b"),
        fingerprint("1", "a", "1", "b"), fingerprint("1", "a", "2", "b"),
    ]  # fmt: skip
    assert len(set(ways)) == len(ways)


def test_flags_of_the_trainer() -> None:
    """Each field is a flag; weights and paths stay words in their order."""
    line = (
        "--load ckpt --train-iters 1 --data-path 0.3 a 0.7 b --split 9,1 --no-append-eod --text-key body --skip-bad-lines 5 "
        "--bare-dtype uint16 --num-workers 0 --data-order megatron --eod-mask-loss --eod-token-id 3"
    )
    values = parse_flags(line.split()).of("data")
    made = DataConfig(**values, seq_length=8, vocab_size=9)
    assert made.blends()[1] == Blend(("a", "b"), (0.3, 0.7))
    assert (made.append_eod, made.text_key, made.skip_bad_lines, made.num_workers) == (False, "body", 5, 0)
    assert (made.bare_dtype, made.data_order, made.split, made.needs_eod, made.eod_token_id) == (
        "uint16", "megatron", (9.0, 1.0), True, 3,
    )  # fmt: skip


def test_words_as_a_settings_file_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_words(("a", "hf://x/y")) == (f"{tmp_path}/a", "hf://x/y")
    assert absolute_words(("3", "a", "1", "/b")) == ("3", f"{tmp_path}/a", "1", "/b")
    assert absolute_words(()) == ()


def test_made_up_tokens() -> None:
    data = source(mock_data=True)
    samples = data.samples("train")
    assert samples.num_tokens > 4_000_000
    assert samples.sample(0).max() < VOCAB
    assert data.has("valid")


def test_the_group_of_data_in_a_settings_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data:\n  data-path: [0.3, a, 0.7, b]\n  no-append-eod: true\n")
    values = parse_flags(["--config", str(tmp_path / "run.yaml")]).of("data")
    assert values == {"data_path": ("0.3", "a", "0.7", "b"), "append_eod": False}
    (tmp_path / "flat.yaml").write_text("data: [a, b]\n")
    assert parse_flags(["--config", str(tmp_path / "flat.yaml")]).of("data") == {"data_path": ("a", "b")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_come_in_page_locked_memory(corpora: dict[str, str]) -> None:
    data = source(data_path=(corpora["a"],), split=(1,), eod_mask_loss=True, reset_attention_mask=True, eod_token_id=7)
    loader = Loader(
        samples=data.samples("train"), micro_batch_size=2, dp_rank=0, dp_size=1, eod=7, reset_attention_mask=True, eod_mask_loss=True
    )  # fmt: skip
    prefetcher = Prefetcher(loader, num_workers=2, pin=True)
    for step in range(5):
        pinned, plain = prefetcher.global_batch(4 * step, 4), loader.global_batch(4 * step, 4)
        assert all(batch.tokens.is_pinned() and batch.labels.is_pinned() for batch in pinned)
        there = [batch.to(torch.device("cuda")) for batch in pinned]
        assert there[0].document_ids is not None
        assert there[0].document_ids.is_cuda
        assert batches_equal([batch.to(torch.device("cpu")) for batch in there], plain)
    prefetcher.close()

"""The ids are those of `tokenizer(text)`, whatever state the tokenizer's files keep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaTokenizer

from runtime.data.errors import DataError
from runtime.data.tokenizer import Encoder, digest_files, encoder_spec, load_tokenizer

TEXTS = [
    "Hello world, this is a longer text than any limit.",
    "  two leading spaces",
    "caf\u00e9 cafe\u0301 \ufb01 \u00a0 \u4e2d\u6587 \U0001f600\n\n",
    "<s>special</s> tokens <extra> inside",
    "x",
    "UPPER lower",
]


def edit(change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def backend(change: Callable[[Tokenizer], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))

    return apply


def _template(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )


STATES: dict[str, Callable[[Path], None]] = {
    "as saved": lambda folder: None,
    "truncation": backend(lambda t: t.enable_truncation(4)),
    "truncation from the left": backend(lambda t: t.enable_truncation(4, direction="left", stride=1)),
    "padding": backend(lambda t: t.enable_padding(pad_id=2, length=64)),
    "padding to a multiple": backend(lambda t: t.enable_padding(pad_id=2, pad_to_multiple_of=8, direction="left")),
    "truncation and padding": backend(lambda t: (t.enable_truncation(4), t.enable_padding(length=16))),
    "template of special tokens": backend(_template),
    "template and truncation": backend(lambda t: (_template(t), t.enable_truncation(5))),
    "no post-processor": edit(lambda v: v.update(post_processor=None)),
    "added token": backend(lambda t: t.add_tokens(["<extra>", "longer"])),
    "added special token": backend(lambda t: t.add_special_tokens(["<extra>"])),
    "normalizer NFC": edit(lambda v: v.update(normalizer={"type": "NFC"})),
    "normalizer lower case and strip": edit(
        lambda v: v.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
            }
        )
    ),
    "prefix space": edit(lambda v: v["pre_tokenizer"].update(add_prefix_space=True)),
    "no prefix space": edit(lambda v: v["pre_tokenizer"].update(add_prefix_space=False)),
    "longest sequence": edit(lambda v: v.update(model_max_length=4), "tokenizer_config.json"),
    "sides": edit(lambda v: v.update(truncation_side="left", padding_side="left"), "tokenizer_config.json"),
    "split special tokens": edit(lambda v: v.update(split_special_tokens=True), "tokenizer_config.json"),
    "adds a beginning": edit(lambda v: v.update(add_bos_token=True, add_eos_token=False), "tokenizer_config.json"),
    "adds an end": edit(lambda v: v.update(add_bos_token=True, add_eos_token=True), "tokenizer_config.json"),
    "cleans spaces": edit(lambda v: v.update(clean_up_tokenization_spaces=True), "tokenizer_config.json"),
    "class Llama": edit(lambda v: v.update(tokenizer_class="LlamaTokenizer"), "tokenizer_config.json"),
    "class GPT-2": edit(lambda v: v.update(tokenizer_class="GPT2Tokenizer"), "tokenizer_config.json"),
}


@pytest.mark.parametrize("state", STATES)
def test_ids_are_those_of_a_call(tokenizer_folder: Path, tmp_path: Path, state: str) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    STATES[state](folder)
    reference = AutoTokenizer.from_pretrained(folder)
    # A call of the tokenizer neither pads nor cuts unless it is asked to, whatever the file keeps.
    expected = [reference(text, padding=False, truncation=False)["input_ids"] for text in TEXTS]
    assert expected == [reference(text)["input_ids"] for text in TEXTS]
    for append in (True, False):
        encoder = Encoder(encoder_spec(load_tokenizer(folder), folder, append_eod=append))
        assert encoder.encode(TEXTS) == expected
        ended = [encoder.end(ids) for ids in expected]
        if append:
            assert [ids[-1] for ids in ended] == [1] * len(TEXTS)
            assert all(ids[-2:] != [1, 1] for ids in ended)
        else:
            assert ended == expected


def test_states_do_change_the_ids(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The states above are no empty gesture: the backend by itself follows them."""
    for state in ("truncation", "padding"):
        folder = tmp_path / state
        shutil.copytree(tokenizer_folder, folder)
        STATES[state](folder)
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert raw.encode(TEXTS[0]).ids != AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]


def test_dropout_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    edit(lambda v: v["model"].update(dropout=0.1))(folder)
    with pytest.raises(DataError, match='set "dropout" to null'):
        encoder_spec(load_tokenizer(folder), folder, append_eod=True)
    edit(lambda v: v["model"].update(dropout=None))(folder)  # the advice, obeyed
    encoder_spec(load_tokenizer(folder), folder, append_eod=True)


def test_a_class_that_changes_the_text_is_called_itself(tokenizer_folder: Path) -> None:
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)

    class Shouting(type(reference)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
            return super()._encode_plus([part.upper() for part in text], *arguments, **options)

    tokenizer = Shouting.from_pretrained(tokenizer_folder)
    assert encoder_spec(tokenizer, tokenizer_folder, append_eod=True).backend is None
    assert encoder_spec(reference, tokenizer_folder, append_eod=True).backend is not None
    slow = Encoder(encoder_spec(tokenizer, tokenizer_folder, append_eod=True))
    assert slow.encode(TEXTS) == [reference(text)["input_ids"] for text in TEXTS]  # loaded anew, by its own class


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A model as Llama's: BPE with byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_a_bare_sentencepiece_model_is_llamas(sentencepiece_model: Path, tmp_path: Path) -> None:
    import sentencepiece

    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(sentencepiece_model, folder)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    llama = LlamaTokenizer.from_pretrained(folder)
    plain = [text for text in TEXTS if "<s>" not in text and not text.startswith(" ")]
    for number, path in enumerate((folder, folder / "tokenizer.model", folder)):
        if number == 2:  # AutoTokenizer's generic class would drop the space that begins each text
            (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
        encoder = Encoder(encoder_spec(load_tokenizer(path), path, append_eod=True))
        assert encoder.encode(TEXTS) == [llama(text)["input_ids"] for text in TEXTS]
        assert encoder.encode(plain) == [own.encode(text) for text in plain]
        assert encoder.end([5]) == [5, 2]


def test_a_sentencepiece_model_without_its_library(sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"needs the library sentencepiece.*pip install 'moeconv\[data\]'"):
        load_tokenizer(sentencepiece_model)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match="tiktoken vocabulary"):
        load_tokenizer(tmp_path)


def test_a_lone_tokenizer_json_has_no_end(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = encoder_spec(load_tokenizer(path), path, append_eod=True)
    assert spec.eod is None
    assert Encoder(spec).end([5]) == [5]


def test_the_name_of_a_tokenizer_is_its_content(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A checkpoint that a run saves has the tokenizer's files and another config.json: its text isn't tokenized anew."""
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_folder, copy)
    assert digest_files(copy) == digest_files(tokenizer_folder)
    (copy / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 384}))
    named = digest_files(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "mixtral", "use_cache": False}))
    assert digest_files(copy) == named
    edit(lambda v: v.update(add_bos_token=True), "tokenizer_config.json")(copy)
    assert digest_files(copy) != named

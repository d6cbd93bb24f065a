"""Conversations to marked ids: against transformers' own masks, and by hand where a template has no marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import AutoTokenizer

from runtime.data import units
from runtime.data.chat import ChatEncoder, ChatSpec, chat_spec
from runtime.data.conversations import Conversation, conversation_of
from runtime.data.documents import Bad
from runtime.data.errors import DataError
from runtime.data.indexed import open_tokens
from runtime.data.listing import list_files
from runtime.data.prepare import PrepareOptions, prepare
from runtime.data.tokenizer import encoder_spec, load_tokenizer
from tests.runtime.data.chats import CHATML, INSTRUCT, THINKING, Record, make_chats, with_template, without_marks

Ids = list[int]


def spec_of(folder: Path, **options: Any) -> ChatSpec:
    given = {"template": None, "turns": "all", "plain_prompts": False, "append_eod": True} | options
    return chat_spec(load_tokenizer(folder), folder, **given)


def encode(encoder: ChatEncoder, record: Any) -> tuple[Ids, list[bool]]:
    conversation = conversation_of(record, lambda: "here")
    assert isinstance(conversation, Conversation), conversation
    marked = encoder.encode(conversation)
    assert not isinstance(marked, str), marked
    return (marked >> 1).tolist(), (marked & 1 == 1).tolist()


def theirs(folder: Path, template: str, record: Record) -> tuple[Ids, list[bool]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        record["messages"], tools=record.get("tools"), chat_template=template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


@pytest.fixture(scope="module")
def chatml(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tokenizer_folder, CHATML, tmp_path_factory.mktemp("chatml"))


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("template", [CHATML, INSTRUCT], ids=["chatml", "instruct"])
def test_masks_are_those_of_transformers(
    template: str, marks: bool, tokenizer_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    """Without marks, prefixes must give what transformers gives for the same template with marks."""
    folder = with_template(tokenizer_folder, template if marks else without_marks(template), tmp_path)
    encoder, plain = ChatEncoder(spec_of(folder)), template is INSTRUCT
    for record in make_chats(texts, 24, system=not plain, tools=not plain):
        ids, trained = theirs(folder, template, record)
        assert any(trained)
        assert encode(encoder, record) == (ids, trained)


def test_a_template_from_a_file(tokenizer_folder: Path, chatml: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(INSTRUCT)
    [record] = make_chats(texts, 1, system=False, tools=False)
    mine = encode(ChatEncoder(spec_of(chatml, template=tmp_path / "t.jinja")), record)
    assert mine == theirs(chatml, INSTRUCT, record)
    with pytest.raises(DataError, match=r"--chat-template .*no.jinja: can't be read"):
        spec_of(chatml, template=tmp_path / "no.jinja")


@pytest.mark.parametrize("marks", [True, False])
def test_the_last_turn_alone(marks: bool, tokenizer_folder: Path, texts: list[str], tmp_path: Path) -> None:
    folder = with_template(tokenizer_folder, CHATML if marks else without_marks(CHATML), tmp_path)
    encoder = ChatEncoder(spec_of(folder, turns="last"))
    for record in make_chats(texts, 12):
        ids, every = theirs(folder, CHATML, record)
        starts = [n for n, mark in enumerate(every) if mark and not every[n - 1]]
        assert encode(encoder, record) == (ids, [mark and n >= starts[-1] for n, mark in enumerate(every)])


def test_a_template_whose_prefixes_are_none(tokenizer_folder: Path, texts: list[str], tmp_path: Path) -> None:
    folder = with_template(tokenizer_folder, THINKING, tmp_path)
    record: Record = {"messages": [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b")) * 2]}
    with pytest.raises(
        DataError,
        match=r"here: the chat template of .* writes the first 2 messages otherwise.*think.*--chat-template FILE.*--assistant-turns last",
    ):
        encode(ChatEncoder(spec_of(folder)), record)
    ids, trained = encode(ChatEncoder(spec_of(folder, turns="last")), record)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.decode([i for i, mark in zip(ids, trained, strict=True) if mark])
        == "<think>\n\n</think>\n\nb<|im_end|>\n"
    )
    assert encode(ChatEncoder(spec_of(folder)), {"messages": record["messages"][:2]})[1][-1]


def test_a_generation_prompt_that_no_turn_begins_with(tokenizer_folder: Path, tmp_path: Path) -> None:
    """As DeepSeek R1's, which opens thoughts that turns don't keep: learning the last turn alone would not help."""
    folder = with_template(tokenizer_folder, without_marks(INSTRUCT), tmp_path / "t")
    (tmp_path / "r1.jinja").write_text(without_marks(INSTRUCT) + "{{- '<think>' if add_generation_prompt -}}")
    with pytest.raises(
        DataError, match=r"the chat template of .*r1\.jinja writes the first 1 messages otherwise"
    ) as caught:
        encode(ChatEncoder(spec_of(folder, template=tmp_path / "r1.jinja")), {"messages": [USER, ANSWER]})
    assert "--assistant-turns" not in str(caught.value)


def test_prompts_and_completions(tokenizer_folder: Path, chatml: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    record = {"prompt": "What is 2 + 2?", "completion": " It is four."}
    turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
    assert encode(ChatEncoder(spec_of(chatml)), record) == theirs(chatml, CHATML, {"messages": turns})
    # As they stand: the tokenizer's own ids, and the end-of-sequence token is learned.
    bare = with_template(tokenizer_folder, None, tmp_path)
    for encoder in (ChatEncoder(spec_of(chatml, plain_prompts=True)), ChatEncoder(spec_of(bare))):
        ids, trained = encode(encoder, record)
        assert ids == [*tokenizer(record["prompt"] + record["completion"])["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode([i for i, mark in zip(ids, trained, strict=True) if mark]) == " It is four.</s>"
    assert encode(ChatEncoder(spec_of(bare, append_eod=False)), record)[0] == ids[:-1]


@pytest.mark.parametrize("marks", [True, False])
def test_nothing_of_a_prompt_of_messages_is_learned(marks: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = with_template(tokenizer_folder, CHATML if marks else without_marks(CHATML), tmp_path)
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids, trained = encode(
        ChatEncoder(spec_of(folder)), {"prompt": before, "completion": [{"role": "assistant", "content": "d"}]}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([i for i, mark in zip(ids, trained, strict=True) if mark]) == "d<|im_end|>\n"


def test_every_kind_of_file_gives_the_same(
    chatml: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    records = make_chats(texts, 20)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(records))
    # A table has every key in every row, and tools are often kept as a string there.
    rows = [record | {"tools": json.dumps(record["tools"]) if "tools" in record else None} for record in records]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    found = {}
    for name in ("a.jsonl", "a.json", "a.parquet"):
        out = tmp_path / f"{name}.bin"
        workers = 2 if name == "a.jsonl" else 1
        result = prepare(list_files(str(tmp_path / name)).files, out, spec_of(chatml), PrepareOptions(workers=workers))
        file = open_tokens(out)
        found[name] = [part.tolist() for part in np.split(file.tokens, file.document_ends[:-1])]
        assert (result.documents, result.bad, result.empty) == (20, 0, 0)
    encoder = ChatEncoder(spec_of(chatml))
    want = [[2 * i + mark for i, mark in zip(*encode(encoder, record), strict=True)] for record in records]
    assert found == dict.fromkeys(found, want)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD: dict[str, tuple[Any, str]] = {
    "no object": ([1], 'expected an object with "messages"'),
    "text": ({"text": "a"}, "it has text; text without conversations is given with --data-path"),
    "ShareGPT": ({"conversations": []}, 'rename "conversations"'),
    "nothing": ({}, "it has none"),
    "prompt alone": ({"prompt": "a"}, "it has prompt"),
    "mixed": ({"prompt": "a", "completion": [ANSWER]}, '"prompt" is a string and "completion" a list'),
    "no list": ({"messages": "a"}, 'its "messages" is a string; expected a list'),
    "empty": ({"messages": []}, "is an empty list"),
    "message": ({"messages": [USER, "b"]}, 'message 2 of "messages" is a string'),
    "role": ({"messages": [{"from": "human", "value": "a"}]}, 'has no "role" that is a string; it has from, value'),
    "content": (
        {"messages": [USER, {"role": "assistant", "content": 3}]},
        'the "content" of message 2 of "messages" is a number',
    ),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, 'message 2 of "messages" has no "content"'),
    "nobody": (
        {"messages": [USER]},
        'no message of "messages" has the role "assistant", so nothing is learned; the roles are user',
    ),
    "no answer": ({"prompt": [USER], "completion": [USER]}, 'no message of "completion" has the role'),
    "tools": ({"messages": [USER, ANSWER], "tools": "look"}, '"tools" are a string that is no JSON'),
    "tool": ({"messages": [USER, ANSWER], "tools": [1]}, '"tools" are a list; expected a list of objects'),
    "options": ({"messages": [USER, ANSWER], "chat_template_kwargs": 1}, '"chat_template_kwargs" are a number'),
    "surrogate": ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "a lone surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation(name: str) -> None:
    record, what = BAD[name]
    found = conversation_of(record, lambda: "here")
    assert isinstance(found, Bad)
    assert what in found.what


def test_bad_lines_are_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = with_template(tokenizer_folder, INSTRUCT, tmp_path / "t")
    good = json.dumps({"messages": [USER, ANSWER]})
    (tmp_path / "a.jsonl").write_text(
        "\n".join([good, "{", good, json.dumps({"messages": [USER, USER, ANSWER]}), good])
    )
    files, spec = list_files(str(tmp_path / "a.jsonl")).files, spec_of(folder)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON.*--skip-bad-lines N"):
        prepare(files, tmp_path / "out.bin", spec, PrepareOptions(workers=1))
    with pytest.raises(DataError, match=r"line 4: the chat template takes no such conversation \(roles must alternate"):
        prepare(files, tmp_path / "one.bin", spec, PrepareOptions(workers=1, skip_bad_lines=1))
    result = prepare(files, tmp_path / "two.bin", spec, PrepareOptions(workers=1, skip_bad_lines=2))
    assert (result.documents, result.bad) == (3, 2)


def test_conversations_given_as_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}))
    spec = encoder_spec(load_tokenizer(tokenizer_folder), tokenizer_folder, append_eod=True)
    with pytest.raises(DataError, match="it has messages; the trainer takes conversations with --finetune-data"):
        prepare(list_files(str(tmp_path / "a.jsonl")).files, tmp_path / "o.bin", spec, PrepareOptions(workers=1))


def test_what_can_not_be_rendered(tokenizer_folder: Path, tmp_path: Path) -> None:
    bare = with_template(tokenizer_folder, None, tmp_path)
    with pytest.raises(DataError, match=r"here: the tokenizer .* has no chat template.*--chat-template FILE"):
        encode(ChatEncoder(spec_of(bare)), {"messages": [USER, ANSWER]})
    (tmp_path / "a.parquet").unlink(missing_ok=True)
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has the columns text; expected an object with \"messages\""):
        prepare(
            list_files(str(tmp_path / "a.parquet")).files, tmp_path / "o.bin", spec_of(bare), PrepareOptions(workers=1)
        )

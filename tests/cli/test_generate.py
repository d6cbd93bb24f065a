"""`moeconv generate`: what transformers writes, as text, as JSON, in a chat, from any form of a checkpoint."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from transformers import AutoTokenizer, MixtralForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cli.main import main
from moeconv.adapters.export import plan_peft, write_peft
from moeconv.adapters.merge import merge, write_merge
from moeconv.adapters.source import open_adapter
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from runtime.generate.config import GenerateConfig
from runtime.generate.prompts import Prompts
from runtime.generate.sampling import Sampler, probabilities
from runtime.generate.sources import open_source
from runtime.generate.stream import TextStream
from runtime.model.lora import LoraConfig
from tests.adapters.saves import train
from tests.runtime.data.chats import CHATML, with_template
from tests.runtime.tiny import make_checkpoint
from tests.runtime.words import VOCAB_SIZE

PROMPT = "def parse(self, text):"
COUNT = 12


class Command:
    """`moeconv generate` in this process."""

    def __init__(self, captured: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._captured, self._monkeypatch = captured, monkeypatch

    def __call__(self, *words: object, stdin: str = "") -> tuple[int, str, str]:
        """Run it; give its exit status, standard output and standard error."""
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf8"))
        with pytest.raises(SystemExit) as end:
            main(["generate", *map(str, words)], standalone_mode=False)
        if dist.is_initialized():  # an error leaves that to the end of the process
            dist.destroy_process_group()
        out, err = self._captured.readouterr()
        return int(end.value.code or 0), out, err

    def written(self, *words: object, stdin: str = "") -> list[dict[str, Any]]:
        """Give the texts of --json."""
        status, out, err = self(*words, "--json", "--max-new-tokens", COUNT, stdin=stdin)
        assert status == 0, err
        found: list[dict[str, Any]] = json.loads(out)["texts"]
        return found


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capfd, monkeypatch)


class Place:
    """A tiny Mixtral with a chat template, and transformers' greedy tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny = folder, make_checkpoint(folder / "tiny")
        with_template(self.tiny, CHATML, self.tiny)
        self.tokenizer = AutoTokenizer.from_pretrained(self.tiny)
        self.model = MixtralForCausalLM.from_pretrained(self.tiny, dtype=torch.float32)

    def greedy(self, ids: list[int], model: Any = None) -> list[int]:
        how: dict[str, Any] = {"do_sample": False, "max_new_tokens": COUNT, "pad_token_id": 0}
        with torch.no_grad():
            row = (model or self.model).generate(torch.tensor([ids]), **how)[0]
        tokens: list[int] = row[len(ids) :].tolist()
        return tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("generate"))


def test_texts_are_those_of_transformers(generate: Command, place: Place) -> None:
    sharded = place.folder / "sharded"
    write_sharded(open_checkpoint(place.tiny), sharded, Degrees(tp=2, ep=2, etp=1), Options())
    want = [place.greedy(place.tokenizer(text)["input_ids"]) for text in (PROMPT, "import")]
    first, second = generate.written(sharded, "--prompt", PROMPT, "import")
    assert [first["tokens"], second["tokens"]] == want
    assert first["text"] == place.tokenizer.decode(want[0], skip_special_tokens=True)
    assert first["prompt"] == PROMPT
    assert first["prompt_tokens"] == len(place.tokenizer(PROMPT)["input_ids"])
    assert first["stopped"] == "length"
    status, out, _ = generate(place.tiny, "--prompt", "-", "--max-new-tokens", COUNT, stdin=PROMPT)
    assert (status, out) == (0, first["text"] + "\n")


def test_adapters_write_what_the_merged_model_writes(generate: Command, place: Place, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, alpha=8.0, targets=("*self_attn*", "*experts*"))
    trained = train(tmp_path, "mixtral", config, vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    base = trained.base
    write_merge(merge(base, open_adapter(trained.save, base.model)), tmp_path / "merged", Options(), logits=False)
    write_peft(plan_peft(trained.opened), tmp_path / "peft", Options())
    ids = place.tokenizer(PROMPT)["input_ids"]
    want = place.greedy(ids, MixtralForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert want != place.greedy(ids, MixtralForCausalLM.from_pretrained(base.root, dtype=torch.float32))
    words = ("--prompt", PROMPT, "--tokenizer-model", place.tiny)
    [run] = generate.written(trained.save.parent, *words)
    [peft] = generate.written(base.root, "--adapter", tmp_path / "peft", *words)
    assert run["tokens"] == peft["tokens"] == want


def test_it_ends_where_generation_config_says(generate: Command, place: Place) -> None:
    tokens = place.greedy(place.tokenizer(PROMPT)["input_ids"])
    path = place.tiny / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"eos_token_id": [1, tokens[5]]}))
    try:
        [found] = generate.written(place.tiny, "--prompt", PROMPT)
    finally:
        path.write_text(before)
    assert found["tokens"] == tokens[: tokens.index(tokens[5])]
    assert found["stopped"] == "end"


def test_a_message_is_answered_through_the_chat_template(generate: Command, place: Place) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is d\u00e9j\u00e0 vu?"}]
    ids = place.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    [typed] = generate.written(place.tiny, "--chat", "--system", "Be brief.", stdin="What is d\u00e9j\u00e0 vu?\n")
    assert typed["messages"] == messages
    assert typed["prompt_tokens"] == len(ids)
    assert typed["tokens"] == place.greedy(ids)
    (place.folder / "chat.json").write_text(json.dumps({"messages": messages}))
    [read] = generate.written(place.tiny, "--messages", place.folder / "chat.json")
    assert read["tokens"] == typed["tokens"]
    [bf16] = generate.written(place.tiny, "--messages", "-", "--bf16", stdin=json.dumps(messages))
    assert bf16["prompt_tokens"] == len(ids)
    assert len(bf16["tokens"]) == COUNT


def test_what_is_drawn_follows_the_seed(generate: Command, place: Place) -> None:
    def draw(seed: int, *texts: str) -> list[list[int]]:
        found = generate.written(place.tiny, "--prompt", *texts, "--temperature", 2, "--seed", seed)
        return [text["tokens"] for text in found]

    first, second = draw(1, PROMPT, PROMPT)
    assert first != second, "each text draws numbers of its own"
    assert draw(1, PROMPT) == [first], "whatever else is written"
    assert draw(2, PROMPT) != [first]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (9, 0.4), (1000, 1e-9)])
def test_probabilities_are_those_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    want = TemperatureLogitsWarper(0.7)(None, logits[None])
    want = TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = (TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want)[0].softmax(0)
    got = probabilities(logits, 0.7, top_k, top_p)
    assert torch.equal(got > 0, want > 0)
    assert torch.allclose(got, want, rtol=1e-9, atol=0)
    sampler = Sampler(0.7, top_k, top_p, 1, 0)
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(600)]), minlength=60)
    assert not counts[want == 0].any()
    # Five standard deviations of a share of 600 draws.
    assert ((counts / 600 - want).abs() <= 5 * (want * (1 - want) / 600).sqrt() + 1e-12).all()


def test_streamed_pieces_are_whole_characters(place: Place) -> None:
    text = " d\u00e9j\u00e0 \u4e2d\u6587 \U0001f600x\U0001f600"
    ids = [
        *place.tokenizer(text)["input_ids"],
        1,
        *place.tokenizer("\u00e9")["input_ids"][:1],
    ]  # half a character at last
    stream = TextStream(place.tokenizer)
    pieces = [stream.push(number) for number in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.end() == "\ufffd"
    assert stream.whole() == text + "\ufffd"
    assert len([piece for piece in pieces if piece]) > 5


CONVERSATIONS: dict[str, tuple[Any, str]] = {
    "an unknown role": ([{"role": "bot", "content": "x"}], "message 1 has the role 'bot'; expected one of system, developer, user, assistant, tool"),
    "answered already": ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the last message is the assistant's"),
    "no messages": ({"text": "x"}, 'expected an object with "messages"'),
    "no content": ([{"role": "user"}], 'message 1 of "messages" has no "content"'),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_that_can_not_be_answered(generate: Command, case: str, place: Place) -> None:
    value, message = CONVERSATIONS[case]
    status, out, err = generate(place.tiny, "--messages", "-", stdin=json.dumps(value))
    assert status == 2
    assert message in err
    assert out == ""


def test_texts_that_leave_no_room(generate: Command, place: Place) -> None:
    status, _, err = generate(place.tiny, "--prompt", PROMPT * 200)
    assert status == 2
    assert "leaves no room for another one: the model was made for 256 positions" in err
    long = place.tokenizer.decode(place.tokenizer(PROMPT * 200)["input_ids"][:252])
    count = len(place.tokenizer(long)["input_ids"])
    assert 240 < count < 256
    [found] = generate.written(place.tiny, "--prompt", long)
    assert (len(found["tokens"]), found["stopped"]) == (256 - count, "positions")
    assert generate(place.tiny, "--prompt", "")[0] == 2


def test_models_without_a_tokenizer_or_a_template(generate: Command, place: Place) -> None:
    bare = place.folder / "bare"
    place.model.save_pretrained(bare)
    status, _, err = generate(bare, "--prompt", PROMPT)
    assert status == 2
    assert "no usable tokenizer" in err
    assert "--tokenizer-model" in err
    with_template(place.tiny, None, bare)
    status, _, err = generate(bare, "--chat", stdin="Hello")
    assert status == 2
    assert "has no chat template for messages; give one with --chat-template FILE" in err
    (place.folder / "t.jinja").write_text(CHATML)
    [found] = generate.written(bare, "--chat", "--chat-template", place.folder / "t.jinja", stdin="Hello")
    assert found["tokens"] == generate.written(place.tiny, "--chat", stdin="Hello")[0]["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x"], "CKPT comes first"),
        (["ckpt"], "nothing to go on with: give --prompt TEXT"),
        (["ckpt", "--prompt", "x", "--top-q", "3"], "unknown flag --top-q; nearest: --top-"),
        (["ckpt", "--prompt", "x", "--chat"], "--prompt excludes --chat"),
        (["ckpt", "--prompt", "x", "--top-p", "0.5"], "--top-p is of tokens that are drawn, and --temperature 0 draws none"),
        (["ckpt", "--prompt", "x", "--system", "y"], "--system begins a conversation"),
        (["ckpt", "--prompt", "x", "--temperature", "-1"], "--temperature is -1.0; expected at least 0"),
        (["ckpt", "--prompt", "x", "--lr", "1"], "--lr does nothing where text is written"),
        (["ckpt", "--prompt", "x", "--context-parallel-size", "2"], "--context-parallel-size 2: a text is written by whole sequences"),
    ],
)  # fmt: skip
def test_command_lines_that_can_not_be_meant(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["generate", *words])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_talk_goes_on_turn_by_turn(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Hello", "", "Why?", "x" * 4000, "/new", "Again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys, "stdin", Terminal())
    prompts = Prompts(place.tiny, None, 384)
    talk = open_source(GenerateConfig(chat=True, system="Be brief."), prompts, 256, {})
    answers = iter(["Oh.", "So.", "Yes."])
    asked = []
    for ids in talk.texts():
        asked.append(place.tokenizer.decode(ids))
        for token in place.tokenizer(next(answers))["input_ids"]:
            talk.token(token)
        talk.done("end")
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Oh."), ("user", "Why?")]
    again = [("system", "Be brief."), ("user", "Again")]
    for found, messages in zip(asked, (turns[:2], turns, again), strict=True):
        conversation = [{"role": role, "content": content} for role, content in messages]
        assert found == place.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    out, err = capsys.readouterr()
    assert out == "Oh.\nSo.\nYes.\n"
    assert "leaves no room for another one" in err, "the turn is left out, and the talk goes on"


class Terminal(io.StringIO):
    """Standard input that somebody sits at."""

    def isatty(self) -> bool:
        return True

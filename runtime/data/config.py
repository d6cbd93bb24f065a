"""Where a run's tokens come from, and how samples are made of them; each field is a flag of the same name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from runtime.data.blend import Blend, parse_blend
from runtime.data.errors import DataError
from runtime.data.turns import AssistantTurns
from runtime.errors import require
from runtime.flag import check_fields, flag

MOCK = "--mock-data"
"""Stands for the path of made-up tokens."""
SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = (969.0, 30.0, 1.0)

DataOrder = Literal["epochs", "megatron"]
BareDtype = Literal["uint8", "uint16", "uint32", "int16", "int32", "int64"]
BARE_DTYPES: tuple[str, ...] = get_args(BareDtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where a run's tokens come from."""

    data_path: tuple[str, ...] = flag((), "--data-path", "--data", metavar="PATH")
    """Data that `--split` divides: files, folders, Megatron's prefixes, folders that `datasets` saved, or
    hf://OWNER/NAME[/CONFIG][:SPLIT]; or weights and paths in turn (0.3 a 0.7 b), which deal out the samples."""
    data_args_path: Path | None = None
    """File that holds what --data-path would say, separated by white space."""
    split: tuple[float, ...] | None = flag(None, metavar="TRAIN,VALID,TEST")
    """Relative sizes of the train, valid and test parts, in documents of each path, in this order; default 969,30,1. A
    path that is a single document is cut by tokens."""
    train_data_path: tuple[str, ...] = flag((), metavar="PATH")
    """Data for training only, as --data-path takes it; with valid and test of its own instead of --split."""
    valid_data_path: tuple[str, ...] = flag((), metavar="PATH")
    """Data for validation only, as --data-path takes it."""
    test_data_path: tuple[str, ...] = flag((), metavar="PATH")
    """Data for the test only, as --data-path takes it."""
    per_split_data_args_path: Path | None = None
    """JSON file with the lists "train", "valid" and "test", each as --data-path takes it."""
    multiple_validation_sets: bool = False
    """Each path of --valid-data-path is a validation set with a loss of its own."""
    mock_data: bool = False
    """Train on made-up tokens, to try a layout and its speed without data."""
    finetune_data: tuple[str, ...] = flag((), metavar="PATH")
    """Conversations instead of text: files or folders of JSON Lines, JSON, Parquet or Arrow with "messages", or with
    "prompt" and "completion"; or weights and paths in turn. What the assistant says is learned."""
    finetune_valid_data: tuple[str, ...] = flag((), metavar="PATH")
    """Conversations for validation only, as --finetune-data takes them, instead of a part of those (--split)."""
    chat_template: Path | None = None
    """File with a chat template (Jinja) instead of the tokenizer's own."""
    assistant_turns: AssistantTurns = "all"
    """Which turns of the assistant are learned: all, or the last of each conversation."""
    plain_prompts: bool = False
    """A "prompt" that is a string, and its completion, stand as they are, without the chat template."""
    drop_long: bool = False
    """Leave out conversations longer than a sample, instead of cutting them."""
    show_sample: bool = False
    """Print the first sample, with what is learned of it in colour, and leave."""
    data_order: DataOrder = "epochs"
    """Order of the samples. epochs: every document once, then every document again in another order, whatever the
    length of the run. megatron: exactly the samples that Megatron-Core takes with the same seed, length of the run and
    evaluation flags."""
    text_key: str = "text"
    """Field or column that holds a document's text."""
    append_eod: bool = True
    """Put the tokenizer's end-of-sequence token behind each document, unless it is there already."""
    skip_bad_lines: int = flag(0, at_least=0)
    """Lines or rows without a text that are left out of each path; one more is an error."""
    bare_dtype: BareDtype | None = None
    """Type of the ids in .bin files without an .idx file."""
    tokenizer_model: Path | None = None
    """Folder with a tokenizer, tokenizer.json, or sentencepiece's tokenizer.model; default: the checkpoint's own."""
    data_cache_path: Path | None = None
    """Folder for tokenized text and indices; default: moeconv/tokens under ~/.cache or $XDG_CACHE_HOME."""
    tokenize_workers: int = flag(0, at_least=0)
    """Processes that tokenize text on each machine; 0 is one a core."""
    num_workers: int = flag(2, at_least=0)
    """Threads of each rank that read batches ahead; 0 reads them when they are due."""
    reset_position_ids: bool = False
    """Positions begin at 0 in each document."""
    reset_attention_mask: bool = False
    """A token attends to those of its own document only."""
    eod_mask_loss: bool = False
    """What follows an end-of-document token is no part of the loss."""
    eod_token_id: int | None = flag(None, at_least=0)
    """The end-of-document token of the three flags above; default: the tokenizer's end-of-sequence token."""
    seq_length: int
    """Tokens of a sample; the trainer's."""
    seed: int = 1234
    """Seed of the order of documents and samples; the trainer's."""
    vocab_size: int
    """Size of the model's vocabulary; ids beyond it are refused."""

    def __post_init__(self) -> None:
        check_fields(self)
        split = self.split
        require(
            split is None or (1 <= len(split) <= 3 and min(split) >= 0 and sum(split) > 0),
            f"--split is {','.join(map(str, split or ()))}; expected up to three numbers (train,valid,test), not all 0",
        )
        own = [f"--{name}-data-path" for name in SPLITS if getattr(self, f"{name}_data_path")]
        own += ["--per-split-data-args-path"] if self.per_split_data_args_path else []
        shared = ["--data-path"] if self.data_path else []
        shared += ["--data-args-path"] if self.data_args_path else []
        shared += ["--mock-data"] if self.mock_data else []
        shared += ["--finetune-data"] if self.finetune_data else []
        ways = shared + (own if "--per-split-data-args-path" in own else own[:1])
        require(len(ways) <= 1, f"{' excludes '.join(ways)}: give one or the other")
        require(bool(ways), "no data: name files or folders with --data-path (or --mock-data to try a layout)")
        require(
            not (own and split),
            f"--split divides --data-path; {' '.join(own[:1])} names the parts themselves: leave --split out",
        )
        require(
            not self.multiple_validation_sets or bool(own or self.finetune_valid_data),
            "--multiple-validation-sets: name them with --valid-data-path",
        )
        self._check_conversations()

    def _check_conversations(self) -> None:
        """Refuse what conversations don't go together with, and what is for conversations only."""
        for name in ("finetune_valid_data", "chat_template", "plain_prompts", "drop_long"):
            require(
                self.finetuning or not getattr(self, name),
                f"--{name.replace('_', '-')} is for conversations: give them with --finetune-data, or leave it out",
            )
        require(
            self.finetuning or self.assistant_turns == "all",
            "--assistant-turns is for conversations: give them with --finetune-data, or leave it out",
        )
        require(
            not (self.finetune_valid_data and self.split),
            "--split divides --finetune-data; --finetune-valid-data names the validation part itself: give one of them",
        )
        for name, why in (
            ("eod_mask_loss", "what is learned of a conversation is settled by its roles"),
            ("bare_dtype", "token files hold no conversations"),
        ):
            require(
                not (self.finetuning and getattr(self, name)),
                f"--{name.replace('_', '-')} with --finetune-data: {why}; leave it out",
            )
        require(
            not (self.finetuning and self.data_order == "megatron"),
            "--data-order megatron is for text; conversations are laid into rows whole: leave it out",
        )

    @property
    def own_splits(self) -> bool:
        """Whether the parts have data of their own, instead of shares of the same."""
        shared = self.data_path or self.data_args_path or self.mock_data
        return bool(self.finetune_valid_data) if self.finetuning else not shared

    @property
    def finetuning(self) -> bool:
        """Whether the data are conversations."""
        return bool(self.finetune_data)

    @property
    def separates_documents(self) -> bool:
        """Whether attention stays in documents; conversations never see each other."""
        return self.reset_attention_mask or self.finetuning

    @property
    def restarts_positions(self) -> bool:
        """Whether positions begin at 0 in each document."""
        return self.reset_position_ids or self.finetuning

    @property
    def needs_eod(self) -> bool:
        """Whether samples are made with knowledge of the end-of-document token."""
        return not self.finetuning and (self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss)

    def blends(self) -> tuple[Blend | None, Blend | None, Blend | None]:
        """Read what data each of train, valid and test has; the same blend three times where `split` divides it.

        Returns:
            The blends; None where a part has no data.

        Raises:
            ConfigError: weights and paths don't go together.
            DataError: a file of arguments can't be read.
        """
        if self.mock_data:
            return (Blend((MOCK,)),) * 3
        if self.finetuning:
            train = parse_blend(self.finetune_data, "--finetune-data")
            valid = parse_blend(self.finetune_valid_data, "--finetune-valid-data")
            return (train, valid, None) if valid is not None else (train, train, train)
        if not self.own_splits:
            words, flag = list(self.data_path), "--data-path"
            if self.data_args_path is not None:
                words, flag = _read(self.data_args_path).split(), f"--data-args-path {self.data_args_path}"
                require(bool(words), f"{flag}: the file names no data")
            blend = parse_blend(words, flag)
            return blend, blend, blend
        if self.per_split_data_args_path is not None:
            return _per_split(self.per_split_data_args_path)
        train = parse_blend(self.train_data_path, "--train-data-path")
        valid = parse_blend(self.valid_data_path, "--valid-data-path")
        test = parse_blend(self.test_data_path, "--test-data-path")
        return train, valid, test


def _per_split(path: Path) -> tuple[Blend | None, Blend | None, Blend | None]:
    flag = f"--per-split-data-args-path {path}"
    try:
        table: Any = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{flag}: not JSON ({error})") from None
    require(isinstance(table, dict), f'{flag}: expected an object with the lists "train", "valid" and "test"')
    unknown = sorted(table.keys() - set(SPLITS))
    require(not unknown, f"{flag}: has {', '.join(map(repr, unknown))}; expected train, valid and test")
    found: list[Blend | None] = []
    for name in SPLITS:
        words = table.get(name) or []
        words = words.split() if isinstance(words, str) else words
        require(isinstance(words, list), f"{flag}: {name!r} is {type(words).__name__}; expected a list")
        found.append(parse_blend([str(word) for word in words], f"{flag}, {name}"))
    require(any(found), f"{flag}: names no data")
    return found[0], found[1], found[2]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None

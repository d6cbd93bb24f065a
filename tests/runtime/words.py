"""Real text from the standard library, and a byte-level BPE tokenizer trained on it."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 384


def real_text() -> str:
    """Give some tens of kB of English and Python."""
    return Path(argparse.__file__).read_text() + Path(textwrap.__file__).read_text()


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of VOCAB_SIZE tokens with <s> = 0 and </s> = 1 to a folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([real_text()], vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], show_progress=False)
    inner = bpe._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

"""A run that begins with drawn weights: what its flags must say for that, and the checkpoint that stands for them."""

from __future__ import annotations

import math
from pathlib import Path

from moeconv.families.key_states import SPECIAL_TOKENS
from runtime.data.config import DataConfig
from runtime.errors import require
from runtime.flag import flag_name
from runtime.initial.config import InitConfig
from runtime.initial.describe import Described, describe, from_config
from runtime.initial.draw import DrawnCheckpoint, drawn_checkpoint
from runtime.initial.flags import config_from_flags
from runtime.initial.tokenizer import read_tokenizer
from runtime.model.support import stored_dtype
from runtime.settings.architecture import as_arguments, missing_facts
from runtime.settings.flags import Given
from runtime.settings.steps import TrainConfig

_INIT, _TOKENIZER = flag_name(InitConfig, "init_config"), flag_name(DataConfig, "tokenizer_model")
_VOCAB = "--vocab-size"


def draw(given: Given, why: str) -> tuple[DrawnCheckpoint, Path, str]:
    """Make the checkpoint of drawn weights that a run begins with.

    Args:
        given: what the command line says.
        why: how it comes that there is no checkpoint, for messages.

    Returns:
        The checkpoint; what stands for its path, which has its tokenizer unless the settings name one; and a line for the
        log.

    Raises:
        MoeconvError: flags are missing, all of which it names, or the model or tokenizer can't be made of what they say.
    """
    init, train = InitConfig(**given.of("init")), TrainConfig(**given.of("train"))
    tokenizer: Path | None = given.of("data").get("tokenizer_model")
    require(tokenizer is None or tokenizer.exists(), f"{_TOKENIZER} {tokenizer}: no such file or folder")
    if init.init_config is not None:
        described = from_config(init.init_config, train.dtype, init.init_method_std, tokenizer)
    else:
        described = _from_flags(given, init, train.dtype or "float32", tokenizer, why)
    model = described.model
    path = described.folder or Path("drawn weights")
    checkpoint = drawn_checkpoint(path, model, stored_dtype(model), train.seed, init, described.files)
    std, scaled = model.compute.init_std, ""
    if init.use_scaled_init_method:
        scaled = f" ({std / math.sqrt(2 * model.sizes['layers']):.3g} of output projections)"
    source = f"as {init.init_config} says" if init.init_config is not None else "as the flags say"
    drawn = f"--seed {train.seed}, standard deviation {std:g}{scaled}"
    return checkpoint, path, f"DRAWING WEIGHTS: {why}. A new {model.family.name} {source}: {drawn}"


def _from_flags(given: Given, init: InitConfig, dtype: str, tokenizer: Path | None, why: str) -> Described:
    stated = dict(given.stated)
    missing = missing_facts(stated)
    if _VOCAB not in stated and tokenizer is None:
        missing.append(f"{_TOKENIZER} (or {_VOCAB})")
    moe = [name for (group, _), name in given.names.items() if group == "moe"]
    if moe and "--num-experts" not in stated:
        missing.append(f"--num-experts (for {', '.join(moe)})")
    require(
        not missing,
        f"{why}; to draw a model's weights, say what it is: {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} missing. Or name a config.json with {_INIT}, or a checkpoint with --load",
    )
    facts = read_tokenizer(tokenizer) if tokenizer is not None else None
    if facts is not None:
        size = stated.setdefault(_VOCAB, facts.vocab_size)
        require(
            size >= facts.vocab_size,
            f"{_VOCAB} is {size}; the tokenizer {tokenizer} has ids up to {facts.vocab_size - 1}: give at least "
            f"{facts.vocab_size}, or leave {_VOCAB} out",
        )
    arguments = as_arguments(stated)
    if init.init_method_std is not None:
        arguments["init_method_std"] = init.init_method_std
    config = config_from_flags(arguments, dtype, expert_bias=bool(given.of("moe").get("enable_expert_bias")))
    # A silent config would mean the special tokens of the family's first model.
    special = dict(facts.special) if facts is not None else dict.fromkeys(SPECIAL_TOKENS)
    return describe(dict(sorted((config | special).items())), facts, {}, None, "the architecture flags")

"""Settings of a run that writes text: what follows from that, and which flags have nothing to say in it."""

from __future__ import annotations

import dataclasses

from runtime.errors import require
from runtime.flag import flag_name
from runtime.generate.config import GenerateConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.flags import Given

# Whole groups, and fields of the others.
_GROUPS = frozenset({"generate", "parallel", "moe", "lora"})
_FIELDS = frozenset(
    (
        *(("checkpoint", name) for name in ("load", "ckpt_step", "override_router", "exit_on_missing_checkpoint")),
        *(("train", name) for name in ("dtype", "seed", "distributed_timeout_minutes", "skip_train")),
        *(("data", name) for name in ("tokenizer_model", "chat_template")),
    )
)
_NOT = frozenset(
    {("moe", "capacity_factor"), ("moe", "pad_to_capacity")}
)  # which token is dropped depends on the others


def for_generation(given: Given) -> tuple[Given, GenerateConfig | None]:
    """Find out whether a run writes text, and fill in what that implies.

    Args:
        given: what the command line says.

    Returns:
        The same with what is implied: nothing is trained, and there are no data; and the settings of what is written.
        None where a run trains or evaluates.

    Raises:
        ConfigError: a flag does nothing where text is written, or something is missing.
    """
    config = GenerateConfig(**given.of("generate"))
    if not config.wanted:
        return given, None
    for key, name in given.names.items():
        fits = (key[0] in _GROUPS or key in _FIELDS) and key not in _NOT
        require(fits, f"{name} does nothing where text is written: leave it out")
    require(("checkpoint", "load") in given.values, "--load is missing: name the model that is to write")
    cp = given.values.get(("parallel", "cp"), 1)
    require(
        cp == 1,
        f"{flag_name(ParallelConfig, 'cp')} {cp}: a text is written by whole sequences; spread the model by tensor, pipeline "
        "and expert parallelism",
    )
    template = given.values.get(("data", "chat_template"))
    values = {key: value for key, value in given.values.items() if key != ("data", "chat_template")}
    values |= {("train", "skip_train"): True, ("data", "mock_data"): True}
    return dataclasses.replace(given, values=values), dataclasses.replace(config, chat_template=template)

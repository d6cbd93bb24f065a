"""What a config.json with other values leads to: followed, harmless, or refused by name; anything else is a finding."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.families import FAMILIES
from moeconv.families.key_states import NOISE, State, key_states
from tests.fuzz.judge import TOLERANCE, Judge, Ours, Theirs, gap

# What transformers 5 refuses by its types, or crashes at, and what other versions of it take: our meaning is theirs.
OLDER = {("head_dim", None), ("head_dim", "absent"), ("num_key_value_heads", None)}
_FIELD = re.compile(r"Validation error for (?:field|validator) '(\w+)'")
# A tensor that doesn't fit, or another key that a key contradicts.
_OTHER = re.compile(
    r"config\.json: \w+( or \w+)? is |\.weight|\.bias|_proj|config\.json implies|lacks \w+\.|is no tensor of"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happened: `kind` is followed, harmless, refused, theirs (only transformers refuses, of no matter here) or finding; `what` is said of it."""

    kind: str
    what: str = ""


def state_of(model_type: str, key: str) -> State | None:
    """Give the state of a key, of the outer one where it is nested; None where it is unknown."""
    return key_states(FAMILIES[model_type]).get(key.split(".")[0])


def verdict(judge: Judge, keys: Sequence[str], raw: bytes, *, named: bool = True) -> Verdict:
    """Compare what transformers and this project make of a config.

    Args:
        judge: the family's.
        keys: the keys that are other than the base's.
        raw: the config.json.
        named: whether a refusal has to name one of the keys.

    Returns:
        The verdict.
    """
    ours = judge.ours(raw)
    if (
        not named and "import" in ours.refusals
    ):  # whatever it says, and however large a model transformers would make of it
        return Verdict("refused", ours.refusals["import"][:200])
    theirs = judge.judge(raw)
    if "trainer" in ours.refusals:
        return _refused(judge, keys, raw, ours, theirs, named=named)
    assert ours.checkpoint is not None
    if theirs.error is not None:
        found = _lenient(judge, keys, raw, theirs)
        if found is None:
            return Verdict("finding", f"computes what transformers refuses: {theirs.error}")
        theirs = found
    if theirs.other:
        return Verdict("finding", f"accepts tensors that are not transformers': {theirs.other[0]}")
    assert theirs.logits is not None
    assert theirs.training is not None
    assert judge.base_theirs.logits is not None
    changed = _changed(judge, ours)
    ours_logits = judge.our_logits(ours.checkpoint) if changed else judge.base_logits
    if (far := gap(ours_logits, theirs.logits)) > TOLERANCE:
        return Verdict("finding", f"logits differ by {far:.2g}")
    # Noise that the trainer has a flag for: it says so at the start (test_flags).
    noise = any(key in NOISE and state_of(judge.model_type, key) == "harmless" for key in keys)
    if not noise and gap(theirs.training, theirs.logits) > TOLERANCE:
        return Verdict("finding", "transformers computes something else in training")
    moved = gap(theirs.logits, judge.base_theirs.logits) > TOLERANCE
    if moved and not {state_of(judge.model_type, key) for key in keys} & {"honoured", "refused"}:
        return Verdict("finding", "a key that is harmless or unknown has an effect")
    if changed and ours.args is not None and ours.args == judge.base.args:
        return Verdict("finding", "export-megatron writes the same args")
    return Verdict("followed" if moved or changed else "harmless")


def _changed(judge: Judge, ours: Ours) -> bool:
    assert ours.checkpoint is not None
    assert judge.base.checkpoint is not None
    new, old = ours.checkpoint.model, judge.base.checkpoint.model
    return new != old or new.compute != old.compute


def _refused(judge: Judge, keys: Sequence[str], raw: bytes, ours: Ours, theirs: Theirs, *, named: bool) -> Verdict:
    for who, message in ours.refusals.items():
        if (
            named
            and message != judge.base.refusals.get(who)
            and not refusal_names(keys, message, judge.base.refusals.get(who))
        ):
            return Verdict("finding", f"{who} refuses without naming the key: {message[:160]}")
    if FAMILIES[judge.model_type].compute.lacks is not None and "import" not in ours.refusals:
        if theirs.other and not {state_of(judge.model_type, key) for key in keys} & {"refused"}:
            return Verdict("finding", f"imports tensors that are not transformers': {theirs.other[0]}")
        return Verdict("carried")
    if theirs.other and "import" in ours.refusals and (wrong := _redrawn(judge, raw)):
        return Verdict("finding", wrong)
    return Verdict("refused", next(iter(ours.refusals.values()))[:200])


def refusal_names(keys: Sequence[str], message: str, before: str | None) -> bool:
    """Say whether a refusal names one of these keys, or the tensors that don't fit, or says nothing more than `before`."""
    leaves = {part for key in keys for part in key.split(".")}
    rotary = any(
        key.startswith("rope") or key in ("partial_rotary_factor", "original_max_position_embeddings") for key in keys
    )
    return (
        any(leaf in message for leaf in leaves)
        or bool(_OTHER.search(message))
        or (rotary and ("rotary" in message or any(word in message for word in ("rope_type", "yarn", "mscale"))))
        or (before is not None and set(before.split("; ")) >= set(message.split("; ")))
    )


def _redrawn(judge: Judge, raw: bytes) -> str | None:
    """Compare on tensors of the config's own shapes; what is wrong."""
    again = judge.redrawn(raw)
    if again is None:
        return None
    ours, theirs = again.ours(raw), again.judge(raw)
    if "trainer" in ours.refusals or theirs.logits is None:
        return None
    assert ours.checkpoint is not None
    far = gap(again.our_logits(ours.checkpoint), theirs.logits)
    return f"of its own tensors, logits differ by {far:.2g}" if far > TOLERANCE else None


def _lenient(judge: Judge, keys: Sequence[str], raw: bytes, theirs: Theirs) -> Theirs | None:
    """Ask transformers again without what it only refuses by type: keys that have no effect, and whole numbers where it wants broken ones."""
    config: dict[str, Any] = json.loads(raw)
    changed, asked = copy.deepcopy(config), False
    for key in keys:
        value = config.get(key, "absent")
        older = (value is None or value == "absent") and (key, value) in OLDER
        if older or state_of(judge.model_type, key) in ("harmless", None):
            asked = True
            changed.pop(key, None)
            if key in judge.config:
                changed[key] = judge.config[key]
    for _ in range(4):
        found = judge.judge(json.dumps(changed).encode())
        field = _FIELD.search(found.error or "")
        value = changed.get(field[1]) if field is not None else None
        if field is None or isinstance(value, bool) or not isinstance(value, int):
            break
        changed[field[1]], asked = float(value), True
    return found if found.error is None and asked else None

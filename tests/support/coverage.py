"""`python -m tests.support.coverage`: which family is tested for what, as the page docs/coverage.md, read from the tests' own cases."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig

from moeconv.errors import MappingError
from moeconv.families import FAMILIES
from moeconv.families.base import Family, Model
from moeconv.families.wrapped import WRAPPED
from moeconv.megatron.model_args import model_args
from moeconv.megatron.tensors import megatron_tensors
from runtime.parity.cases import CASES as PARITY
from tests.megatron import test_families as megatron
from tests.moeconv import test_quantised as quantised
from tests.moeconv.families import test_stored_forms as forms
from tests.moeconv.families import test_wrapped as wrapped
from tests.runtime.model import test_transformers as trainer
from tests.upcycle.hub import FAMILIES as TINY
from tests.upcycle.hub import SIZES

HEAD = """# What is tested of which family

Made from the tests' own cases by `python -m tests.support.coverage > docs/coverage.md`; a test holds them equal. A cell that says yes is a
case of the test named below; any other says why there is none.

| column | what holds |
| --- | --- |
| round trip | hub -> layouts over tp, pp, ep and etp -> export: the sha256 of every file is the source's (`test_stored_forms.py`, `test_wrapped.py`) |
| fused names | transformers 5's stacks hold the same tensors as the published names; each comes back, either is written (the same) |
| quantised | the bytes of quantised weights come back; their cast to bf16 is the maker's own, bit for bit (`test_quantised.py`) |
| carried | tensors that the model doesn't compute with come back byte for byte (`test_stored_forms.py`, `test_wrapped.py`) |
| Megatron | `torch` and `torch_dist`, both ways: megatron-core 0.16.1's fp32 logits are transformers' within 2e-5, every byte comes back |
| | (`tests/megatron/test_families.py`, docs/megatron.md) |
| logits, gradients | fp32, relative to the largest: at most 1e-5 from transformers' (`tests/runtime/model/test_transformers.py`) |
| parity | losses, gradients and weights under tp, sp, pp, ep, etp and cp within 1e-5 of one rank's (`tests/runtime/parallel/test_parity.py`) |
"""
# The families that the quantised forms are tested on; a scheme is a rule of matrices, whatever family they are of.
QUANTISED = {
    "deepseek_v3": "FP8 blocks, its further layer's too",
    "qwen3_moe": ", ".join(sorted(set(quantised.FORMS) - {"fp8 exponents"})),
    "gpt_oss": "MXFP4",
    "qwen3": "FP8 blocks",
    "kimi_k25": "packed int4",
}


def page() -> str:
    """Give the page's text."""
    lines = [HEAD, *_table()]
    return "\n".join(lines) + "\n"


def _table() -> Iterator[str]:
    yield "| family | round trip | fused names | quantised | carried | Megatron | logits, gradients | parity |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for family in (*FAMILIES.values(), *WRAPPED):
        cells = (_round_trip(family), _fused(family), _quantised(family), _carried(family), _megatron(family))
        yield f"| {' | '.join((family.name, *cells, *_trained(family)))} |"


def _round_trip(family: Family) -> str:
    tested = {*forms.MIXTURES, *forms.DENSE, *wrapped.MODELS}
    return "yes" if family.model_type in tested else "not tested"


def _fused(family: Family) -> str:
    if "experts" not in family.sizes:
        return "no experts"
    return "yes" if family.model_type in {*forms.MIXTURES, *wrapped.MODELS} else "not tested"


def _quantised(family: Family) -> str:
    return QUANTISED.get(family.model_type, "by the same rules")


def _carried(family: Family) -> str:
    if family.model_type in wrapped.MODELS:
        return "pictures' parts"
    marked = [case for case, (model_type, *_) in forms.FURTHER.items() if model_type == family.model_type]
    return ", ".join(case.split(" of ")[0] for case in marked) or "marks none; `--carry`"


def _megatron(family: Family) -> str:
    if family.compute.lacks is not None:
        return f"refused: {family.compute.lacks}"
    config = AutoConfig.for_model(family.model_type, **(SIZES | TINY[family.model_type])).to_dict()
    refused = _refusal(Model.from_config(family, config))
    if any(model_type == family.model_type for model_type, _ in megatron.MODELS.values()):
        return "yes" + (f"; refused: {refused}" if refused else "")
    return f"refused: {refused}"


def _refusal(model: Model) -> str:
    try:
        megatron_tensors(model)
        model_args(model)
    except MappingError as error:
        return str(error).partition("can't say ")[2] or str(error)
    return ""


def _trained(family: Family) -> tuple[str, str]:
    if family.compute.lacks is not None:
        return (f"refused: {family.compute.lacks}",) * 2
    computed = {model_type for model_type, _ in trainer.CASES.values()}
    parallel = {case.model.get("model_type", "mixtral") for case in PARITY}
    cells = (family.model_type in found for found in (computed, parallel))
    first, second = ("yes" if tested else "not by itself: its parts are those of others" for tested in cells)
    return first, second


if __name__ == "__main__":
    print(page(), end="")

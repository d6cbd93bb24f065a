"""The real megatron-core on a CPU: it loads what we export, strictly, with transformers' logits; we import what it saves.

Transformer Engine does not run on a CPU. Its names are checked by what its modules are called (`_as_local` in
`mcore_ranks`), everything else by megatron-core's own loaders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeconv.layout.degrees import Degrees
from moeconv.megatron.convert import open_megatron
from tests.megatron.conftest import assert_same
from tests.megatron.mcore_ranks import Case, run_cases
from tests.megatron.test_round_trips import bring_back, export

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp": 2, "ep": 2},
    {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
    {"pp": 2, "vpp": 2},
    {"tp": 4, "ep": 4, "etp": 1},  # twice as many tensor ranks as key/value heads
]
OTHERS = [
    ("torch_dist", {"tp": 2, "ep": 2}, {"singleton_local_shards": True}),
    ("torch_dist", {"pp": 2}, {"non_homogeneous_layers": True}),
]


@dataclass
class Outcome:
    case: Case
    logits: torch.Tensor


def name_of(fmt: str, spec: str, layout: dict[str, Any]) -> str:
    return f"{fmt}-{spec}-" + "-".join(f"{k}{v}" for k, v in layout.items())


MATRIX = [(f, s, layout) for f in ("torch", "torch_dist") for s in ("te", "local") for layout in LAYOUTS]


@pytest.fixture(scope="module")
def reference(hf_fp32: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tokens, AutoModelForCausalLM.from_pretrained(hf_fp32, dtype=torch.float32)(tokens).logits


@pytest.fixture(scope="module")
def outcomes(hf_fp32: Path, reference: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: Any) -> dict[str, Outcome]:
    work = tmp_path_factory.mktemp("mcore")
    cases: dict[str, Case] = {}
    for fmt, spec, layout in MATRIX:
        name, experts = name_of(fmt, spec, layout), "grouped" if spec == "te" else "sequential"
        out = export(hf_fp32, work / name, fmt, layout, spec, experts)
        saved = str(work / f"{name}-saved") if spec == "local" else None
        cases[name] = Case(load=str(out), fmt=fmt, spec=spec, experts=experts, save=saved, **layout)
    for number, (fmt, layout, metadata) in enumerate(OTHERS):
        first = next(c for c in cases.values() if (c.fmt, c.spec) == ("torch_dist", "local"))
        case = Case(load=first.load, fmt=fmt, save=str(work / f"other{number}"), save_metadata=metadata, **layout)
        cases[f"other{number}"] = case
    for layout in LAYOUTS:  # a model of megatron-core's own, filled from the Hugging Face folder
        first = cases[name_of("torch", "local", layout)]
        cases[name_of("filled", "local", layout)] = replace(first, fill=str(hf_fp32), save=None)
    logits = run_cases(list(cases.values()), reference[0], work)
    return {name: Outcome(case, got) for (name, case), got in zip(cases.items(), logits, strict=True)}


@pytest.mark.parametrize(("fmt", "spec", "layout"), MATRIX, ids=str)
def test_megatron_core_loads_our_export(
    outcomes: dict[str, Outcome],
    reference: tuple[torch.Tensor, torch.Tensor],
    fmt: str,
    spec: str,
    layout: dict[str, Any],
) -> None:
    torch.testing.assert_close(outcomes[name_of(fmt, spec, layout)].logits, reference[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_load_into_fills_a_model_of_megatron_core(
    outcomes: dict[str, Outcome], reference: tuple[torch.Tensor, torch.Tensor], layout: dict[str, Any]
) -> None:
    got = outcomes[name_of("filled", "local", layout)].logits
    torch.testing.assert_close(got, reference[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("fmt", "layout"), [(f, layout) for f, s, layout in MATRIX if s == "local"], ids=str)
def test_we_import_what_megatron_core_saves(
    outcomes: dict[str, Outcome], hf_fp32: Path, tmp_path: Path, fmt: str, layout: dict[str, Any]
) -> None:
    saved = Path(str(outcomes[name_of(fmt, "local", layout)].case.save))
    assert open_megatron(saved).degrees == Degrees(**layout)
    assert_same(bring_back(saved, tmp_path / "hf"), hf_fp32)


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_we_import_the_other_key_layouts(
    outcomes: dict[str, Outcome], hf_fp32: Path, tmp_path: Path, number: int
) -> None:
    case = replace(outcomes[f"other{number}"].case)
    keys = open_megatron(Path(str(case.save))).pieces
    assert keys
    assert_same(bring_back(Path(str(case.save)), tmp_path / "hf"), hf_fp32)

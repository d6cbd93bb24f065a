"""What a model writes: transformers' greedy tokens, family by family, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.engine import Engine
from runtime.generate.config import GenerateConfig
from runtime.generate.generator import Generator
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.ranks import RankPool
from tests.runtime.model.hub import hub_tensors, model_of, reader
from tests.upcycle.hub import make_model

COUNT = 10
# Of the longrope models texts grow beyond the length at which positions turn otherwise.
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16,
    "short_mscale": 1.1, "long_mscale": 1.3,
}  # fmt: skip
TP, EP, PP = {"tp": 2, "sp": True}, {"ep": 2}, {"pp": 2}
# Family, options, layouts of two ranks. Prompts are longer than the windows of 8.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "mixtral": ("mixtral", {"sliding_window": 8}, [PP, TP | {"ep": 2, "etp": 1}]),
    "qwen3_moe": ("qwen3_moe", {"num_hidden_layers": 3}, [EP]),
    "gpt_oss": ("gpt_oss", {}, [TP]),
    "deepseek_v3": ("deepseek_v3", {}, [TP]),
    "glm4_moe": ("glm4_moe", {}, [PP]),
    "olmoe": ("olmoe", {}, [EP | {"fully_shard": True}]),
    "llama": ("llama", {"tie_word_embeddings": True}, [{"tp": 2}, PP | {"vpp": 2}]),
    "mistral": ("mistral", {}, []),
    "phimoe": ("phimoe", {"rope_scaling": LONGROPE, "max_position_embeddings": 64}, []),
    "granitemoe": ("granitemoe", {}, []),
}
DEEP = {"llama": {"num_hidden_layers": 4}}  # four stages


def prompts(vocab_size: int = 101) -> list[list[int]]:
    """Two texts that begin alike: the second finds what the first has left."""
    return [[(7 * n * n + 3) % vocab_size for n in range(12)], [*((7 * n * n + 3) % vocab_size for n in range(9)), 5]]


def make(name: str) -> Any:
    """The case's transformers model, the same in each process."""
    family, options, _ = CASES[name]
    attention = "eager" if family == "gpt_oss" else "sdpa"
    return make_model(family, attn_implementation=attention, **(options | DEEP.get(name, {}))).eval()


def write(name: str, parallel: dict[str, Any], alone: bool = False) -> list[list[int]]:
    """What the trainer's model writes, on this process's rank."""
    model, degrees = make(name), ParallelConfig(**parallel)
    ours = model_of(model)
    moe = MoEConfig(router=ours.compute.router) if ours.compute.router is not None else None
    mesh = ParallelMesh(degrees, 1, 0) if alone else ParallelMesh(degrees)
    settings = (degrees, moe, OptimConfig(), RecomputeConfig())
    engine = Engine(ours, torch.float32, *settings, mesh, torch.device("cpu"), trains=False)
    engine.load_state(reader(hub_tensors(model, lambda p: p)))
    generator = Generator(engine, GenerateConfig(prompt=("x",), max_new_tokens=COUNT), [], 0)
    return [list(generator.tokens(ids)) for ids in prompts()]


def write_all() -> dict[str, list[list[int]]]:
    """All cases on this rank of two."""
    found = {}
    for name, (_, _, layouts) in CASES.items():
        for layout in layouts:
            found[f"{name} {layout}"] = write(name, layout)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """transformers' greedy tokens."""
    out = {}
    for name in CASES:
        model, found = make(name), []
        for ids in prompts():
            with torch.no_grad():
                row = model.generate(
                    torch.tensor([ids]), do_sample=False, max_new_tokens=COUNT, eos_token_id=None, pad_token_id=0
                )[0]
            found.append(row[len(ids) :].tolist())
        out[name] = found
    return out


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(name: str, expected: dict[str, list[list[int]]]) -> None:
    assert len({token for text in expected[name] for token in text}) > 4, "texts of one token would prove little"
    assert write(name, {}, alone=True) == expected[name]


def test_on_two_ranks_too(pool: RankPool, expected: dict[str, list[list[int]]]) -> None:
    first, second = pool.run(2, write_all)
    assert first == second
    wrong = [case for case, tokens in first.items() if tokens != expected[case.split()[0]]]
    assert not wrong
    assert len(first) == sum(len(layouts) for _, _, layouts in CASES.values())

"""Routers against Megatron-Core's functions, transformers' order of operations and the papers."""

import pytest
import torch

from runtime.moe.config import MoEConfig, MoEConfigError
from runtime.moe.routing import Routing, best_tokens, choose, expert_capacity, route
from runtime.moe.sinkhorn import sinkhorn
from tests.runtime.moe.megatron_reference import MEGATRON
from tests.runtime.moe.oracle import dense
from tests.support.moe import moe_config


def route_dense(logits: torch.Tensor, config: MoEConfig, training: bool = True, bias: torch.Tensor | None = None):
    routing = route(logits, config, choose(logits, config, training=training, bias_E=bias))
    return (*dense(routing.experts_TK, routing.weights_TK, config.num_experts), routing)


@pytest.mark.parametrize("topk", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalise": False},
        {"score": "sigmoid"},
        {"score": "sigmoid", "scale": 2.5},
        {"scale": 1.5},
        {"groups": 4, "group_top_k": 2, "normalise": False},
        {"groups": 4, "group_top_k": 2, "score": "sigmoid"},
    ],
)
def test_topk_equals_megatron(topk: int, options: dict) -> None:
    router = options | ({"normalise": False} if topk == 1 and options.get("score") == "sigmoid" else {})
    if "groups" in options:
        # Megatron adds up the scores of topk // groups of a token experts of each group.
        topk = topk if topk in (2, 4) else 4
        router = options | {"group_best": topk // 2}
    logits = torch.randn(200, 8, dtype=torch.float64).float()
    config = moe_config(num_experts=8, topk=topk, **router)
    weights, chosen, _ = route_dense(logits, config)
    expected, expected_map = MEGATRON.topk_routing_with_score_function(
        logits,
        topk,
        use_pre_softmax=not options.get("normalise", True),
        num_groups=options.get("groups"),
        group_topk=options.get("group_top_k"),
        scaling_factor=options.get("scale"),
        score_function=options.get("score", "softmax"),
    )
    assert torch.equal(chosen, expected_map)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


def test_expert_bias_equals_megatron() -> None:
    logits, bias = torch.randn(300, 16), torch.randn(16)
    config = moe_config(num_experts=16, topk=4, score="sigmoid", enable_expert_bias=True)
    weights, chosen, _ = route_dense(logits, config, bias=bias)
    expected, expected_map = MEGATRON.topk_routing_with_score_function(
        logits, 4, score_function="sigmoid", expert_bias=bias
    )
    assert torch.equal(chosen, expected_map)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


def test_normalised_is_softmax_then_topk_then_division() -> None:
    """The order of transformers' Mixtral gives the weights of Megatron's default."""
    logits = torch.randn(100, 8)
    plain = route_dense(logits, moe_config(num_experts=8))[0]
    chosen = logits.softmax(-1).topk(2)
    expected = torch.zeros(100, 8).scatter(1, chosen.indices, chosen.values / chosen.values.sum(1, keepdim=True))
    torch.testing.assert_close(plain, expected)
    unscaled = route_dense(logits, moe_config(num_experts=8, normalise=False))[0].sum(1)
    assert float(unscaled.max()) < 1.0


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("pad", [False, True])
def test_dropping(policy: str, factor: float, pad: bool) -> None:
    logits = torch.randn(120, 8) + torch.linspace(2, 0, 8)
    options = {"capacity_factor": factor, "drop_policy": policy, "pad_to_capacity": pad}
    weights, kept, routing = route_dense(logits, moe_config(num_experts=8, **options))
    full, full_map, _ = route_dense(logits, moe_config(num_experts=8))
    capacity = min(120, MEGATRON.get_capacity(240, 8, factor))
    assert int(kept.sum()) <= routing.max_rows
    if policy == "probs":
        expected, expected_map = MEGATRON.apply_router_token_dropping(full, full_map, 2, factor, "probs", pad)
        torch.testing.assert_close(weights, expected)
        assert torch.equal(kept & full_map, expected_map & full_map)
    for expert in range(8):
        wanted = full_map[:, expert].nonzero().flatten()
        if policy == "position":
            assert torch.equal((kept & full_map)[:, expert].nonzero().flatten(), wanted[:capacity])
        if pad:
            assert int(kept[:, expert].sum()) == capacity
    torch.testing.assert_close(weights, full * kept)  # nothing is renormalised, padding weighs nothing


def test_equal_probabilities_keep_the_earliest() -> None:
    priority = torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0]])
    assert best_tokens(priority, 3).flatten().tolist() == [True, True, False, True, False]
    assert expert_capacity(10, 2, 8, 1.0) == 3


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
def test_sinkhorn_equals_megatron(scale: float) -> None:
    logits = torch.randn(256, 8, dtype=torch.float64) * scale
    torch.testing.assert_close(sinkhorn(logits, 1000), MEGATRON.sinkhorn(logits.clone()), rtol=2e-3, atol=1e-9)
    for topk in (1, 2):
        config = moe_config(num_experts=8, topk=topk, load_balancing=("sinkhorn",))
        weights, chosen, _ = route_dense(logits, config)
        expected = torch.sigmoid(logits) if topk == 1 else torch.softmax(logits, -1)
        torch.testing.assert_close(weights, expected * chosen)
        evaluated = route_dense(logits, config, training=False)[1]
        assert torch.equal(evaluated, torch.zeros_like(evaluated).scatter(1, logits.topk(topk).indices, True))


@pytest.mark.parametrize("scale", [20.0, 90.0, 1e4, 1e30])
def test_sinkhorn_bears_large_logits(scale: float) -> None:
    plan = sinkhorn(torch.randn(512, 16) * scale)
    assert bool(torch.isfinite(plan).all())
    choices = plan.argmax(1).bincount(minlength=16)
    if scale <= 90:  # balances where the logits leave a choice
        assert int(choices.max()) < 2 * 512 // 16 + 16


def test_expert_choice_is_each_experts_best() -> None:
    logits = torch.randn(50, 4, dtype=torch.float64)
    config = moe_config(num_experts=4, load_balancing=("expert_choice",), capacity_factor=1.5)
    weights, chosen, routing = route_dense(logits, config)
    scores = torch.softmax(logits, -1)
    capacity = 19  # ceil(50 * 1.5 / 4)
    assert routing.max_rows == capacity * 4
    for expert in range(4):
        best = sorted(range(50), key=lambda token, e=expert: -float(scores[token, e]))[:capacity]
        assert sorted(best) == chosen[:, expert].nonzero().flatten().tolist()
    torch.testing.assert_close(weights, scores * chosen)


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("balancing", ["none", "sinkhorn", "expert_choice"])
def test_few_tokens_and_all_experts(num_tokens: int, balancing: str) -> None:
    logits = torch.randn(num_tokens, 4)
    config = moe_config(num_experts=4, topk=4, load_balancing=(balancing,))
    routing: Routing = route_dense(logits, config)[2]
    assert routing.weights_TK.shape == (num_tokens, 4)
    assert bool(torch.isfinite(routing.weights_TK).all())


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"load_balancing": ("sinkhorn",), "aux_loss_coeff": (0.1,)}, "--moe-aux-loss-coeff"),
        ({"load_balancing": ("sinkhorn",), "capacity_factor": 1.0}, "--moe-expert-capacity-factor"),
        ({"load_balancing": ("aux_loss", "none")}, "--moe-router-load-balancing-type"),
        ({"load_balancing": ("magic",)}, "--moe-router-load-balancing-type"),
        ({"enable_expert_bias": True}, "--moe-router-enable-expert-bias"),
        ({"pad_to_capacity": True}, "--moe-expert-capacity-factor"),
        ({"aux_loss_mode": "hf", "load_balancing": ("seq_aux_loss",)}, "--moe-aux-loss-mode"),
        ({"capacity_factor": float("nan")}, "--moe-expert-capacity-factor"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, flag: str) -> None:
    with pytest.raises(MoEConfigError, match=flag):
        moe_config(num_experts=8, **options)

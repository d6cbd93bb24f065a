"""Balancing losses against Megatron-Core, transformers and DeepSpeed's formula, values and gradients."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from runtime.moe import losses
from runtime.moe.layer import MoELayer
from runtime.moe.losses import LinearLoss
from runtime.moe.routing import choose
from runtime.moe.scoring import Scored, score
from runtime.moe.tape import RoutingTape
from tests.runtime.moe.megatron_reference import MEGATRON
from tests.support.launches import Launches
from tests.support.moe import moe_config


def layer(**options) -> MoELayer:
    torch.manual_seed(3)
    config = moe_config(gemm_backend="loop", router_dtype="fp64", **{"num_experts": 8, **options})
    return MoELayer(config, hidden_size=16, ffn_hidden_size=8, dtype=torch.float64)


def attached(module: MoELayer, x: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the router's weight from the attached losses alone, and the logits."""
    module.router.weight.grad = None
    module.router(x, **kwargs).weights_TK.backward(torch.zeros(()).expand(x.shape[0], module.config.topk).double())
    return module.router.weight.grad.clone(), x @ module.router.weight.t()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_aux_and_z_loss_equal_megatron(score_function: str) -> None:
    module = layer(topk=2, aux_loss_coeff=(0.3,), z_loss_coeff=0.2, score=score_function)
    x = torch.randn(60, 16, dtype=torch.float64)
    grad, _ = attached(module, x)
    weight = module.router.weight.detach().clone().requires_grad_()
    logits = x @ weight.t()
    routing_map, scores = MEGATRON.compute_routing_scores_for_aux_loss(logits, 2, score_function)
    if score_function == "softmax":
        scores = torch.softmax(logits, -1)  # Megatron's is rounded to fp32
    aux = MEGATRON.switch_load_balancing_loss_func(scores, routing_map.sum(0), 60, 2, 8, 0.3)
    z = MEGATRON.z_loss_func(logits, 0.2)
    (aux + z).backward()
    torch.testing.assert_close(grad, weight.grad, rtol=1e-10, atol=1e-12)
    assert float(module.stats.losses["aux_loss"]) == pytest.approx(float(aux.detach()) / 0.3, rel=1e-6)
    assert float(module.stats.losses["z_loss"]) == pytest.approx(float(z.detach()) / 0.2, rel=1e-6)


def test_sequence_loss_equals_megatron() -> None:
    module = layer(topk=2, load_balancing=("seq_aux_loss",), aux_loss_coeff=(0.5,))
    num_sequences, length = 3, 20
    x = torch.randn(num_sequences * length, 16, dtype=torch.float64)
    sequence = torch.arange(num_sequences).repeat_interleave(length)
    grad, _ = attached(module, x, sequence_T=sequence, num_sequences=num_sequences)
    weight = module.router.weight.detach().clone().requires_grad_()
    # Megatron folds the batch into the experts: [S, B * E]
    scores = torch.softmax(x @ weight.t(), -1).view(num_sequences, length, 8).transpose(0, 1).reshape(length, -1)
    routing_map = torch.zeros(num_sequences * length, 8).scatter(1, (x @ weight.t()).topk(2).indices, 1)
    routing_map = routing_map.view(num_sequences, length, 8).transpose(0, 1).reshape(length, -1)
    loss = MEGATRON.switch_load_balancing_loss_func(scores, routing_map.sum(0), length, 2, 8, 0.5) / num_sequences
    loss.backward()
    torch.testing.assert_close(grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_global_loss_averages_counts_over_the_window() -> None:
    module = layer(topk=2, load_balancing=("global_aux_loss",), aux_loss_coeff=(1.0,))
    inputs = [torch.randn(30, 16, dtype=torch.float64) for _ in range(3)]
    counts = torch.zeros(8, dtype=torch.float64)
    for step, x in enumerate(inputs, start=1):
        grad, logits = attached(module, x)
        weight = module.router.weight.detach().clone().requires_grad_()
        scores = torch.softmax(x @ weight.t(), -1)
        counts += torch.zeros(30, 8).scatter(1, logits.topk(2).indices, 1).sum(0)
        MEGATRON.switch_load_balancing_loss_func(scores, counts / step, 30, 2, 8, 1.0).backward()
        torch.testing.assert_close(grad, weight.grad, rtol=1e-10, atol=1e-12)
    module.reset_stats()
    again, _ = attached(module, inputs[0])
    fresh = layer(topk=2, load_balancing=("global_aux_loss",), aux_loss_coeff=(1.0,))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(again, attached(fresh, inputs[0])[0])


def test_window_counts_once_when_recomputed() -> None:
    modules = [layer(topk=2, load_balancing=("global_aux_loss",), aux_loss_coeff=(1.0,)) for _ in range(2)]
    for _ in range(3):
        x = torch.randn(30, 16, dtype=torch.float64)
        modules[0](x).sum().backward()
        checkpoint(modules[1], x, use_reentrant=False, context_fn=RoutingTape().contexts).sum().backward()
    plain, again = modules
    torch.testing.assert_close(again.router.weight.grad, plain.router.weight.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(again.stats.losses["global_aux_loss"], plain.stats.losses["global_aux_loss"])


def test_switch_mode_is_deepspeeds_formula() -> None:
    """DeepSpeed: mean(gates) * mean(first choices), mean over experts, times E squared."""
    module = layer(topk=2, aux_loss_coeff=(1.0,), aux_loss_mode="switch")
    x = torch.randn(40, 16, dtype=torch.float64)
    grad, logits = attached(module, x)
    weight = module.router.weight.detach().clone().requires_grad_()
    gates = torch.softmax(x @ weight.t(), -1)
    first = torch.nn.functional.one_hot(logits.argmax(-1), 8).double()
    (torch.mean(gates.mean(0) * first.mean(0)) * 8 * 8).backward()
    torch.testing.assert_close(grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_hf_mode_equals_transformers() -> None:
    logits = [torch.randn(50, 8, requires_grad=True) for _ in range(3)]
    ours = losses.hf_load_balancing_loss(logits, 2)
    theirs = load_balancing_loss_func(tuple(logits), 8, 2)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(mine, other)


def test_balanced_is_one_and_losses_rest_in_evaluation() -> None:
    module = layer(topk=2, aux_loss_coeff=(1.0,), z_loss_coeff=1.0)
    with torch.no_grad():
        module.router.weight.zero_()
    module(torch.randn(8, 16, dtype=torch.float64))
    assert float(module.stats.losses["aux_loss"]) == pytest.approx(1.0)
    module.reset_stats()
    module.eval()
    module(torch.randn(8, 16, dtype=torch.float64))
    module.train()
    with torch.no_grad():
        module(torch.randn(8, 16, dtype=torch.float64))
    assert set(map(float, module.stats.losses.values())) == {0.0}
    assert int(module.stats.load_E.sum()) == 2 * 8 * 2


def test_loss_scale_scales_and_may_be_a_tensor() -> None:
    module = layer(topk=2, aux_loss_coeff=(1.0,))
    x = torch.randn(12, 16, dtype=torch.float64)
    plain, _ = attached(module, x)
    module.loss_scale = torch.tensor(0.25)
    torch.testing.assert_close(attached(module, x)[0], plain * 0.25)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25, dtype=torch.float64)])
@pytest.mark.parametrize("num_tokens", [12, torch.tensor([12.0], dtype=torch.float64)])
def test_gradient_of_linear_losses_by_gradcheck(scale: Any, num_tokens: Any) -> None:
    """Ours is the analytic gradient; the numeric one is of the formulas, of which ours sees no gradient."""
    counts = torch.tensor([9, 4, 6, 0, 5])
    known = isinstance(num_tokens, int)
    parts = [
        LinearLoss(name="aux_loss", place=slice(0, 5), weights=counts, factor=5 / 2 / 144, coeff=0.3),
        LinearLoss(
            name="z_loss", place=slice(10, 11), weights=None if known else num_tokens.reciprocal(),
            factor=1 / 12 if known else 1.0, coeff=0.2,
        ),
    ]  # fmt: skip

    class Attached(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sums: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(sums)
            balance = losses.load_balancing_loss(sums[:5], counts, num_tokens, num_tokens, 2)
            return (scale * (0.3 * balance + 0.2 * sums[10] / num_tokens)).sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                free = ctx.saved_tensors[0].detach().requires_grad_()
                x = losses.attach_linear(torch.zeros(3, dtype=torch.float64, requires_grad=True), free, parts, scale)
                return grad * torch.autograd.grad(x.sum(), free)[0]

    assert torch.autograd.gradcheck(Attached.apply, torch.rand(13, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("coefficients", "forward", "backward"),
    [({"aux_loss_coeff": (0.1,)}, 2, 2), ({"aux_loss_coeff": (0.1,), "z_loss_coeff": 1e-3}, 3, 3)],
)
def test_losses_and_statistics_launch_little(coefficients: dict, forward: int, backward: int) -> None:
    """Given the sums, as the fused router leaves them: a launch for each loss and one for the statistics; back, one and
    one to zero the gradient of the sums, which is handed on as it is."""
    module = layer(topk=2, **coefficients)
    module.loss_scale = torch.tensor(0.5)
    logits = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    made = score(logits, module.config, choose(logits, module.config, training=True))
    scored = Scored(routing=made.routing, sums=made.sums)

    def attach_and_count() -> torch.Tensor:
        routing = module.router._attach_losses(scored, logits, None, 1, equal=False, counting=True)
        with torch.no_grad():
            module.stats.add(scored, drops=False)
        return routing.weights_TK

    attach_and_count()  # allocates the statistics
    with Launches() as launches:
        weights = attach_and_count()
    assert len(launches.names) == forward, launches.names
    grad = torch.ones_like(weights)
    with Launches() as launches:
        torch.autograd.grad(weights, [made.routing.weights_TK, made.sums], grad)
    assert len(launches.names) == backward, launches.names


def test_expert_bias_moves_towards_balance() -> None:
    counts = torch.tensor([5, 1, 3, 3])
    step = losses.expert_bias_step(counts, 0.1, centered=False)
    torch.testing.assert_close(step, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    assert float(losses.expert_bias_step(torch.tensor([9, 1, 1, 1]), 0.1, centered=True).sum()) == pytest.approx(
        0.0, abs=1e-7
    )
    module = layer(topk=2, score="sigmoid", enable_expert_bias=True, expert_bias_update_rate=0.0005)
    x = torch.randn(400, 16, dtype=torch.float64) + 1.0
    spread = []
    for _ in range(100):
        module.router(x)
        spread.append(float(module.stats.load_E.max() / module.stats.load_E.double().mean()))
        module.finish_step()
        module.reset_stats()
    assert spread[-1] < 1.15 < spread[0]

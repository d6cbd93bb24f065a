"""The whole layer against transformers' Mixtral block and fp64 oracles."""

import importlib.util
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moeconv.errors import MoeconvError
from runtime.fp8.config import Fp8Config
from runtime.moe.config import MoEConfig, MoEConfigError
from runtime.moe.grouped_gemm import LoopGemm, describe_backend, resolve_backend
from runtime.moe.grouped_mlp import grouped_mlp
from runtime.moe.layer import MoELayer
from runtime.moe.permutation import plan_rows
from runtime.moe.router import Router
from runtime.moe.routing import Routing, choose, route, turns
from runtime.moe.tape import RoutingTape
from tests.runtime.moe.oracle import dense, moe_output, relative
from tests.support.moe import moe_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype: torch.dtype = torch.float64, **options) -> MoELayer:
    torch.manual_seed(1)
    options = {"num_experts": 4, "gemm_backend": "loop", "router_dtype": "fp64", "load_balancing": ("none",), **options}
    module = MoELayer(moe_config(**options), hidden_size=16, ffn_hidden_size=24, dtype=dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_equals_transformers_mixtral_block(backend: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    reference = MixtralSparseMoeBlock(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = moe_config(num_experts=4, gemm_backend=backend)
    module = MoELayer(options, hidden_size=32, ffn_hidden_size=48)
    pairs = [
        (module.router.weight, reference.gate.weight),
        (module.experts.w13, reference.experts.gate_up_proj),
        (module.experts.w2, reference.experts.down_proj),
    ]
    for ours, theirs in pairs:
        ours.data.copy_(theirs.data)
    x = torch.randn(2, 37, 32, requires_grad=True)
    flat = x.detach().reshape(-1, 32).requires_grad_()
    out = reference(x)
    expected = out[0] if isinstance(out, tuple) else out
    actual = module(flat)
    assert relative(actual.view_as(expected), expected) < 1e-6
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad.view_as(actual))
    assert relative(flat.grad.view_as(x), x.grad) < 1e-6
    for ours, theirs in pairs:
        assert relative(ours.grad, theirs.grad) < 1e-6


@pytest.mark.parametrize("alignment", [1, 4])
def test_gradcheck_with_empty_expert_and_dropped_choices(alignment: int) -> None:
    torch.manual_seed(2)
    num_tokens, topk, num_experts = 11, 2, 5
    experts = torch.stack([torch.randperm(num_experts - 1)[:topk] for _ in range(num_tokens)])
    experts[3, 1] = experts[4, 0] = experts[4, 1] = num_experts
    plan = plan_rows(experts, num_experts, num_tokens * topk, alignment=alignment)
    inputs = (
        torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True),
        torch.rand(num_tokens, topk, dtype=torch.float64, requires_grad=True),
        torch.randn(num_experts, 8, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(num_experts, 6, 4, dtype=torch.float64, requires_grad=True),
    )

    def run(x, weights, w13, w2):
        return grouped_mlp(x, weights, w13, w2, plan, LoopGemm())

    assert torch.autograd.gradcheck(run, inputs)
    kept = torch.where(experts < num_experts, inputs[1], 0)
    expected = moe_output(inputs[0], dense(experts, kept, num_experts)[0], inputs[2], inputs[3])
    assert relative(run(*inputs), expected) < 1e-14


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 1},
        {"topk": 4},
        {"score": "sigmoid"},
        {"load_balancing": ("sinkhorn",)},
        {"load_balancing": ("expert_choice",)},
        {"capacity_factor": 0.7},
        {"capacity_factor": 0.7, "drop_policy": "position", "pad_to_capacity": True},
        {"groups": 2, "group_top_k": 1},
    ],
)
@pytest.mark.parametrize("num_tokens", [33, 1, 0])
def test_equals_every_expert_on_every_token(options: dict, num_tokens: int) -> None:
    """Outputs and all gradients against autograd through the dense computation in fp64."""
    module = make(**options)
    x = torch.randn(num_tokens, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(num_tokens, 16, dtype=torch.float64)
    out = module(x)
    out.backward(grad)
    actual = [out, x.grad, *(p.grad for p in module.parameters())]
    copies = [t.detach().clone().requires_grad_() for t in (x, *module.parameters())]
    logits = copies[0] @ copies[1].t()
    routing = route(logits, module.config, choose(logits, module.config, training=True))
    weights, _ = dense(routing.experts_TK, routing.weights_TK, 4)
    expected = moe_output(copies[0], weights, copies[2], copies[3])
    expected.backward(grad)
    for mine, other in zip(actual, [expected, *(c.grad for c in copies)], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_jitter_reaches_only_the_router_and_only_in_training() -> None:
    module = make(input_jitter_eps=0.4)
    x = torch.randn(64, 16, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(5)
    routing = module.router(x)
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(0.6, 1.4)
    chosen = choose((x * noise) @ module.router.weight.t(), module.config, training=True)
    assert torch.equal(routing.chosen_TK, chosen)
    torch.manual_seed(5)
    weights, _ = dense(routing.experts_TK, routing.weights_TK, 4)
    torch.testing.assert_close(module(x), moe_output(x, weights, module.experts.w13, module.experts.w2))


def test_recompute_keeps_gradients_and_counts_once() -> None:
    module, again = make(aux_loss_coeff=(0.1,), load_balancing=("aux_loss",)), make(recompute_layer=True)
    again.load_state_dict(module.state_dict())
    again.router.config = module.config
    x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (module, again, lambda t: checkpoint(module, t, use_reentrant=False, context_fn=RoutingTape().contexts)):
        target = again if run is again else module
        target.zero_grad()
        target.reset_stats()
        x.grad = None
        run(x).square().sum().backward()
        assert int(target.stats.load_E.sum()) == 20 * module.config.topk
        results.append([x.grad.clone(), *(p.grad.clone() for p in target.parameters())])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs)


def replay(router: Router, x: torch.Tensor) -> Routing:
    """The second run of a router that would choose otherwise by then."""
    first, second = RoutingTape().contexts()
    with first:
        chosen = router(x).chosen_TK
    with torch.no_grad():
        router.weight.neg_()
    with second:
        replayed: Routing = router(x)
    assert torch.equal(replayed.chosen_TK, chosen)
    assert not torch.equal(router(x).chosen_TK, chosen)
    return replayed


def test_tape_keeps_choices_when_the_second_run_would_choose_otherwise() -> None:
    module = make()
    chosen = replay(module.router, torch.randn(30, 16, dtype=torch.float64)).chosen_TK
    assert int(module.stats.load_E.sum()) == 2 * chosen.numel()


def test_the_fused_router_runs_again_with_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, forward and again: gradients as in plain torch, and choices that stay when others would be made."""
    options = {"router_dtype": "fp32", "load_balancing": ("aux_loss",), "aux_loss_coeff": (0.1,), "z_loss_coeff": 0.01}
    plain, fused = make(torch.float32, **options), make(torch.float32, **options)
    x = torch.randn(30, 16, device=DEVICE)
    plain, fused = plain.to(DEVICE), fused.to(DEVICE)
    runs = [lambda: plain(x), lambda: checkpoint(fused, x, use_reentrant=False, context_fn=RoutingTape().contexts)]
    for module in (plain, fused):
        module.reset_stats()  # on the device where the module is now
    for run, fusable in zip(runs, (False, True), strict=True):
        monkeypatch.setattr("runtime.moe.router._fusable", lambda *_, fusable=fusable: fusable)
        run().square().sum().backward()
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-5
    assert torch.equal(fused.stats.load_E, plain.stats.load_E)
    again = replay(fused.router, x)
    shares = torch.softmax((x @ fused.router.weight.t()).gather(1, again.chosen_TK), dim=-1)
    torch.testing.assert_close(again.weights_TK, shares)


@pytest.mark.parametrize("fusable", [False, True])
def test_forced_balance_sends_tokens_to_all_experts_in_turn(fusable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights that the router gives those experts, its gradients and losses, and again where a layer runs again."""
    monkeypatch.setattr("runtime.moe.router._fusable", lambda *_: fusable)
    options = {"num_experts": 5, "topk": 2, "router_dtype": "fp32", "force_load_balancing": True}
    module = make(torch.float32, **options, load_balancing=("aux_loss",), aux_loss_coeff=(0.1,)).to(DEVICE)
    module.reset_stats()
    x = torch.randn(31, 16, device=DEVICE, requires_grad=True)
    out = module(x)
    chosen = torch.tensor([[6 * token % 5, (6 * token + 3) % 5] for token in range(31)], device=DEVICE)
    weights = torch.softmax((x @ module.router.weight.t()).gather(1, chosen), dim=-1)
    shares = torch.zeros(31, 5, device=DEVICE).scatter(1, chosen, weights)
    expected = moe_output(x, shares, module.experts.w13, module.experts.w2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (
        module.stats.load_E.tolist() == torch.bincount(chosen.flatten(), minlength=5).tolist() == [13, 12, 12, 13, 12]
    )
    out.sum().backward()
    assert module.router.weight.grad.abs().max() > 0
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False, context_fn=RoutingTape().contexts).sum().backward()
    for mine, theirs in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(mine.grad, theirs)
    module.eval()
    assert torch.equal(module(x), out)


@pytest.mark.parametrize(
    ("num_experts", "topk", "num_ranks"), [(8, 2, 2), (8, 2, 8), (128, 8, 4), (256, 8, 8), (60, 4, 4)]
)
def test_forced_balance_sends_a_token_to_no_fewer_ranks_than_chance(
    num_experts: int, topk: int, num_ranks: int
) -> None:
    chosen = turns(topk * num_experts, num_experts, torch.device("cpu")).view(-1, topk)
    assert (chosen.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(torch.bincount(chosen.flatten()), torch.full((num_experts,), topk))
    ranks = (chosen // (num_experts // num_ranks)).tolist()
    elsewhere = math.comb(num_experts - num_experts // num_ranks, topk) / math.comb(num_experts, topk)
    assert sum(len(set(row)) for row in ranks) / len(ranks) >= num_ranks * (1 - elsewhere)


def test_statistics_and_non_finite_tokens() -> None:
    module = make(capacity_factor=0.5)
    x = torch.randn(40, 16, dtype=torch.float64)
    x[7, 3] = float("nan")
    x[9, 0] = float("inf")
    module(x)
    stats = module.stats
    assert int(stats.nonfinite) == 2
    assert int(stats.load_E.sum()) == 80
    module.reset_stats()
    module(torch.nan_to_num(x, posinf=1.0))
    logits = torch.nan_to_num(x, posinf=1.0) @ module.router.weight.t()
    capacity = 10
    counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
    assert int(module.stats.dropped) == int((counts - capacity).clamp(min=0).sum())
    probabilities = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(module.stats.entropy, probabilities.entropy().sum().detach())


def test_one_expert_takes_every_token() -> None:
    module = make(topk=1)
    x = torch.rand(50, 16, dtype=torch.float64) + 0.1
    with torch.no_grad():
        module.router.weight.fill_(-1.0)
        module.router.weight[2] = 1.0
    out = module(x)
    out.sum().backward()
    weights = torch.zeros(50, 4, dtype=torch.float64)
    weights[:, 2] = 1
    torch.testing.assert_close(out, moe_output(x, weights, module.experts.w13, module.experts.w2))
    assert module.stats.load_E.tolist() == [0, 0, 50, 0]
    for expert in (0, 1, 3):
        assert float(module.experts.w13.grad[expert].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_fp64(dtype: torch.dtype) -> None:
    module = make(dtype, gemm_backend="torch", router_dtype="fp32")
    x = torch.randn(64, 16).to(dtype)
    out = module(x)
    exact = make()
    for mine, other in zip(exact.parameters(), module.parameters(), strict=True):
        mine.data.copy_(other.data)
    routing = module.router(x)
    weights, _ = dense(routing.experts_TK, routing.weights_TK.double(), 4)
    expected = moe_output(x.double(), weights, exact.experts.w13, exact.experts.w2)
    assert relative(out, expected) < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


def test_bad_input_and_backends_are_refused() -> None:
    module = make()
    with pytest.raises(MoeconvError, match="takes tokens"):
        module(torch.randn(2, 3, 16, dtype=torch.float64))
    with pytest.raises(MoeconvError, match="float32"):
        module(torch.randn(3, 16))
    cpu = torch.device("cpu")
    with pytest.raises(MoEConfigError, match="float64"):
        resolve_backend(moe_config(num_experts=2, gemm_backend="torch"), cpu, torch.float64)
    for backend in ("grouped_gemm", "te", "hopper"):
        with pytest.raises(MoEConfigError, match=backend):
            resolve_backend(moe_config(num_experts=2, gemm_backend=backend), cpu, torch.bfloat16)
    assert resolve_backend(moe_config(num_experts=2), cpu, torch.float64) == "loop"
    assert resolve_backend(moe_config(num_experts=2), cpu, torch.bfloat16) == "torch"


def test_the_backend_that_auto_takes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, cpu, gpu = moe_config(num_experts=2), torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    packages = {"triton", "cuda.bindings"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    lines = {device: describe_backend(auto, device, torch.bfloat16) for device in (cpu, gpu)}
    assert lines[cpu].endswith("torch, chosen by auto")
    assert lines[gpu].endswith("hopper, chosen by auto")
    packages.remove("cuda.bindings")
    assert "torch, chosen by auto; hopper is faster and lacks cuda.bindings: pip install" in describe_backend(
        auto, gpu, torch.bfloat16
    )
    with pytest.raises(MoEConfigError, match=r"hopper needs cuda\.bindings, not installed"):
        resolve_backend(moe_config(num_experts=2, gemm_backend="hopper"), gpu, torch.bfloat16)
    assert describe_backend(moe_config(num_experts=2, gemm_backend="loop"), cpu, torch.float32).endswith(": loop")


def test_experts_in_fp8_take_our_kernels_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, hopper = moe_config(num_experts=2), moe_config(num_experts=2, gemm_backend="hopper")
    gpu, fp8 = torch.device("cuda"), Fp8Config(format="hybrid", recipe="tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    packages = {"triton", "cuda.bindings", "transformer_engine"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    fitting, odd = (256, 384), (256, 200)

    def line(config: MoEConfig = auto, fp8: Fp8Config = fp8, sizes: tuple[int, int] = fitting) -> str:
        return describe_backend(config, gpu, torch.bfloat16, fp8, sizes)

    assert line().endswith("experts: hopper in FP8, chosen by auto")
    assert line(hopper).endswith("experts: hopper in FP8")
    assert line(sizes=odd).endswith(
        "te in FP8, chosen by auto: hopper is faster, and on a rank experts are 256 x 200, where the backend hopper takes "
        "multiples of 128 in FP8"
    )
    assert line(fp8=Fp8Config(format="hybrid", recipe="blockwise")) == line(fp8=fp8)
    with pytest.raises(MoEConfigError, match=r"256 x 200, .* give --moe-grouped-gemm-backend te"):
        resolve_backend(hopper, gpu, torch.bfloat16, fp8, odd)
    packages.remove("transformer_engine")
    assert resolve_backend(auto, gpu, torch.bfloat16, fp8, fitting) == "hopper"
    with pytest.raises(
        MoEConfigError, match=r"take hopper, and on a rank .* 256 x 200, .* or transformer_engine, not installed"
    ):
        resolve_backend(auto, gpu, torch.bfloat16, fp8, odd)
    packages.remove("cuda.bindings")
    with pytest.raises(MoEConfigError, match=r"take hopper, and it lacks cuda\.bindings: .* or transformer_engine"):
        resolve_backend(auto, gpu, torch.bfloat16, fp8, fitting)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    packages |= {"transformer_engine", "cuda.bindings"}
    assert "te in FP8, chosen by auto: hopper is faster, and it takes bfloat16 on Hopper GPUs" in line()
    assert resolve_backend(auto, gpu, torch.bfloat16, Fp8Config()) == "torch"

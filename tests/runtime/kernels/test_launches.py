"""How many kernels, copies and fills the device gets; needs a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.moe import dispatch
from runtime.moe.packed_tokens import Choices, pack_tokens, unpack_tokens
from runtime.moe.permutation import plan_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_tokens_sent_once() -> None:
    """At the sizes of Qwen3-30B-A3B on four ranks, as the profiler counts them."""
    from runtime.kernels.sent_tokens import experts_of_arrivals

    experts = torch.rand(4096, 128, device="cuda").argsort(1)[:, :8].contiguous()
    x = torch.randn(4096, 2048, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(4096, 8, device="cuda").requires_grad_()
    plan = plan_rows(dispatch._homes(experts, 32, 4, fused=True)[0], 4, 4096 * 4)
    choices, blocks = Choices(experts, 32), torch.full((128,), 9, device="cuda")
    packed = pack_tokens(x, weights, choices, plan, fused=True)
    grad = torch.randn_like(packed)
    groups: list[tuple[int, Callable[[], object]]] = [
        (2, lambda: dispatch._homes(experts, 32, 4, fused=True)),
        (2, lambda: dispatch._choices_of_experts(experts, 128, fused=True)),
        (2, lambda: pack_tokens(x, weights, choices, plan, fused=True)),
        (2, lambda: torch.autograd.grad(packed, (x, weights), grad, retain_graph=True)),
        (1, lambda: unpack_tokens(packed.detach(), 8, torch.float32, fused=True)),
        (1, lambda: experts_of_arrivals(blocks, 32, 4096 * 8 * 4)),
    ]
    for expected, group in groups:
        group()  # compiles
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            group()
            torch.cuda.synchronize()
        on_device = [event.name for event in profile.events() if "CUDA" in str(event.device_type)]
        assert len(on_device) == expected, on_device

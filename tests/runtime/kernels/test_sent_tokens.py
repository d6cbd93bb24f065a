"""Kernels of tokens that go to a rank once, against plain torch, bit for bit: odd numbers of tokens, dropped choices, no tokens.

On a GPU the kernels run compiled, without one in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from runtime.moe import dispatch, packed_tokens
from runtime.moe.packed_tokens import Choices, pack_tokens, tail_of, unpack_tokens
from runtime.moe.permutation import RowPlan, plan_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 24
# Tokens, choices of each, ranks, experts of a rank.
SIZES = [(7, 2, 2, 4), (130, 8, 4, 32), (1, 1, 4, 1), (37, 4, 3, 5), (0, 2, 2, 2)]
pytestmark = pytest.mark.usefixtures("_poison")


def random_choices(num_tokens: int, topk: int, num_experts: int) -> Tensor:
    """[T, K] different experts of a token, a fifth of them dropped; of some tokens all."""
    experts = torch.rand(num_tokens, num_experts, device=DEVICE).topk(topk).indices
    experts[torch.rand(experts.shape, device=DEVICE) < 0.2] = num_experts
    experts[::11] = num_experts
    return experts


def planned(sizes: tuple[int, int, int, int]) -> tuple[Tensor, RowPlan]:
    """Choices, and which row goes to which rank, by the plain path."""
    num_tokens, topk, num_ranks, num_local = sizes
    experts = random_choices(num_tokens, topk, num_local * num_ranks)
    ranks, _ = dispatch._homes(experts, num_local, num_ranks, fused=False)
    return experts, plan_rows(ranks, num_ranks, num_tokens * min(num_ranks, topk), fused=False)


@pytest.mark.parametrize("sizes", SIZES)
def test_homes(sizes: tuple[int, int, int, int]) -> None:
    from runtime.kernels.sent_tokens import homes

    num_tokens, topk, num_ranks, num_local = sizes
    experts = random_choices(num_tokens, topk, num_local * num_ranks)
    for found, want in zip(
        homes(experts, num_local, num_ranks),
        dispatch._homes(experts, num_local, num_ranks, fused=False),
        strict=True,
    ):
        assert found.dtype == want.dtype
        assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("sizes", SIZES)
def test_tails(sizes: tuple[int, int, int, int], dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    from runtime.kernels.sent_tokens import find_choices, read_tails, write_tails

    num_tokens, topk, _, num_local = sizes
    experts, plan = planned(sizes)
    end, tail = int(plan.offsets_E[-1]), tail_of(topk, dtype, weights_dtype)
    x = torch.randn(num_tokens, WIDTH, device=DEVICE).to(dtype)
    weights = torch.rand(num_tokens, topk, device=DEVICE, dtype=weights_dtype)
    weights.requires_grad_()
    choices = Choices(experts, num_local)
    want = pack_tokens(x, weights, choices, plan, fused=False)
    packed = torch.full((plan.num_rows, WIDTH + tail), float("nan"), dtype=dtype, device=DEVICE)
    rooms = packed_tokens._rooms(packed[:, WIDTH:], topk, weights_dtype)
    write_tails(experts, weights.detach(), plan.slot_of_row_R, num_local, plan.topk, *rooms)
    assert torch.equal(packed[:, WIDTH:].view(torch.uint8), want.detach()[:, WIDTH:].view(torch.uint8))
    empty = plan.slot_of_row_R < 0
    assert (packed_tokens._experts(packed[empty, WIDTH:].contiguous(), topk) == num_local).all()
    _, back, numbers = unpack_tokens(packed[:end], topk, weights_dtype, fused=False)
    tails = packed[:end, WIDTH:]
    read = read_tails(packed_tokens._experts(tails, topk), packed_tokens._weights(tails, topk, weights_dtype))
    assert torch.equal(read[0], numbers)
    assert torch.equal(read[1], back)
    here = numbers < num_local
    assert int(here.sum()) == int((experts < num_local * plan.topk).sum()), "each kept choice is somewhere"
    assert (back[~here] == 0).all()

    grad = torch.zeros_like(want)
    packed_tokens._weights(grad[:, WIDTH:], topk, weights_dtype).copy_(torch.rand(plan.num_rows, topk, device=DEVICE))
    (expected,) = torch.autograd.grad(want, weights, grad)
    room = packed_tokens._rooms(grad[:, WIDTH:], topk, weights_dtype)[1]
    assert torch.equal(find_choices(experts, plan.row_of_slot_TK, num_local, room), expected)
    if num_tokens > 10:
        assert expected.count_nonzero() > 0


@pytest.mark.parametrize("num_local", [1, 3, 32, 100])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_arrivals(num_local: int, num_ranks: int) -> None:
    from runtime.kernels.sent_tokens import experts_of_arrivals

    blocks = torch.randint(0, 9, (num_ranks * num_local,), device=DEVICE)
    blocks[::3] = 0
    for more in (0, 17):
        bound = int(blocks.sum()) + more
        plain = SimpleNamespace(num_local_experts=num_local, fused=False, plan=lambda ids, _: ids.squeeze(1))
        want = cast(Tensor, dispatch._plan_arrivals(blocks, cast(Any, plain), bound))
        assert torch.equal(experts_of_arrivals(blocks, num_local, bound), want)


def test_they_and_the_routers_compile_for_hopper() -> None:
    """The interpreter doesn't mind what the compiler refuses."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runtime.kernels.moe_for_hopper"]
    lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(set(lines)) == 20


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels' path taken for tensors of the CPU too, which the interpreter takes."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("sizes", SIZES)
def test_counts_of_experts(sizes: tuple[int, int, int, int]) -> None:
    num_experts = sizes[2] * sizes[3]
    experts = random_choices(*sizes[:2], num_experts)
    found, want = (dispatch._choices_of_experts(experts, num_experts, fused=fused) for fused in (True, False))
    assert found.dtype == want.dtype
    assert torch.equal(found, want)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("sizes", SIZES)
def test_packing_and_unpacking_take_the_kernels_and_give_the_same_bits(sizes: tuple[int, int, int, int]) -> None:
    num_tokens, topk, _, num_local = sizes
    experts, plan = planned(sizes)
    end, results = int(plan.offsets_E[-1]), []
    x = torch.randn(num_tokens, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    weights = torch.rand(num_tokens, topk, device=DEVICE)
    grad = torch.rand(plan.num_rows, WIDTH + tail_of(topk, x.dtype, weights.dtype), device=DEVICE).bfloat16()
    packed_tokens._weights(grad[:, WIDTH:], topk, weights.dtype).copy_(torch.rand(plan.num_rows, topk, device=DEVICE))
    for fused in (False, True):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        packed = pack_tokens(inputs[0], inputs[1], Choices(experts, num_local), plan, fused=fused)
        unpacked = [tensor.detach() for tensor in unpack_tokens(packed[:end], topk, weights.dtype, fused=fused)]
        results.append([*unpacked, packed.detach()[:end].view(torch.uint8)])
        results[-1] += torch.autograd.grad(packed, inputs, grad)
    (*plain, plain_x, plain_weights), (*mine, mine_x, mine_weights) = results
    for found, want in zip(mine, plain, strict=True):
        assert torch.equal(found, want)
    assert torch.equal(mine_weights, plain_weights)
    torch.testing.assert_close(mine_x, plain_x, rtol=1e-2, atol=1e-2)  # a sum of rows in bf16

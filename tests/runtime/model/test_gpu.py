"""The engine on a GPU: bf16 beside fp32 on the CPU, and recomputation on the kernels that a GPU gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from runtime.data.batch import Batch
from runtime.generate.stepper import Stepper
from runtime.model.lora import LoraConfig
from tests.runtime.model.wide import batch, make_engine, packed
from tests.support.configs import trained_families

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_bf16_follows_fp32_on_the_cpu() -> None:
    gpu, cpu = make_engine("bfloat16", "cuda"), make_engine("float32", "cpu")
    for step in range(10):
        got, want = gpu.train_step([batch(step)]), cpu.train_step([batch(step)])
        assert got.lm_loss == pytest.approx(want.lm_loss, rel=0.02)
        assert got.aux_loss == pytest.approx(want.aux_loss, rel=0.05)  # single choices of experts turn
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=0.1)


@pytest.mark.parametrize("family", trained_families())
def test_every_family_follows_fp32_on_the_cpu(family: str) -> None:
    want = make_engine("float32", "cpu", family=family).train_step([batch(0)])
    exact = make_engine("float32", "cuda", family=family).train_step([batch(0)])
    rounded = make_engine("bfloat16", "cuda", family=family).train_step([batch(0)])
    assert exact.lm_loss == pytest.approx(want.lm_loss, rel=1e-5)
    assert exact.aux_loss == pytest.approx(want.aux_loss, rel=1e-4)
    assert exact.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
    assert rounded.lm_loss == pytest.approx(want.lm_loss, rel=0.02)
    assert rounded.grad_norm == pytest.approx(want.grad_norm, rel=0.1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_documents_follow_fp32_on_the_cpu(family: str) -> None:
    """Flash attention over sequences of unequal length; with sinks and a window, and in fp32, a mask."""
    want = make_engine("float32", "cpu", family=family).train_step([packed(0)])
    exact = make_engine("float32", "cuda", family=family).train_step([packed(0)])
    rounded = make_engine("bfloat16", "cuda", family=family).train_step([packed(0)])
    assert exact.lm_loss == pytest.approx(want.lm_loss, rel=1e-5)
    assert exact.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
    assert rounded.lm_loss == pytest.approx(want.lm_loss, rel=0.02)
    assert rounded.grad_norm == pytest.approx(want.grad_norm, rel=0.1)


# A rank that fills no 16 bytes, one that does, and one of whole tiles of our own kernels.
@pytest.mark.parametrize("rank", [3, 8, 64])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_adapters_follow_fp32_on_the_cpu(family: str, rank: int) -> None:
    lora = LoraConfig(
        rank=rank, alpha=4.0, targets=("*_proj*",) if family != "mixtral" else ("*self_attn*", "*experts*")
    )
    want = make_engine("float32", "cpu", family=family, lora=lora).train_step([batch(0)])
    exact = make_engine("float32", "cuda", family=family, lora=lora).train_step([batch(0)])
    rounded = make_engine("bfloat16", "cuda", family=family, lora=lora).train_step([batch(0)])
    assert exact.lm_loss == pytest.approx(want.lm_loss, rel=1e-5)
    assert exact.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
    assert rounded.lm_loss == pytest.approx(want.lm_loss, rel=0.02)
    assert rounded.grad_norm == pytest.approx(want.grad_norm, rel=0.1)


@pytest.mark.parametrize("make_batch", [batch, packed])
def test_the_host_waits_for_no_kernel_but_those_whose_numbers_it_reads(make_batch: Callable[[int], Batch]) -> None:
    engine = make_engine("bfloat16", "cuda")
    engine.train_step([make_batch(0), make_batch(1)])  # kernels are compiled when they are first used
    counts = []
    for num in (1, 3):
        batches = [make_batch(step) for step in range(num)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                engine.train_step(batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert counts == [0, 0], "the numbers of a step are read while the optimizer works, at an event"


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recompute_gives_the_same_step(granularity: str) -> None:
    plain, again = make_engine("bfloat16", "cuda"), make_engine("bfloat16", "cuda", granularity)
    want, got = plain.train_step([batch(0)]), again.train_step([batch(0)])
    assert got.lm_loss == pytest.approx(want.lm_loss, rel=1e-3)
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-2)


def test_recomputed_moe_layers_give_the_same_step() -> None:
    plain, again = make_engine("bfloat16", "cuda"), make_engine("bfloat16", "cuda", recompute_layer=True)
    want, got = plain.train_step([batch(0)]), again.train_step([batch(0)])
    assert got.lm_loss == want.lm_loss
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)


@pytest.mark.parametrize("family", trained_families())
def test_a_text_that_grows_has_the_logits_of_one_pass_on_the_cpu(family: str) -> None:
    """Flash attention with more keys than queries; with sinks and a window, and in fp32, a mask."""
    text = batch(0).tokens[0, :24].tolist()
    cpu = make_engine("float32", "cpu", family=family)
    cpu.module.eval()
    with torch.no_grad():
        want_SV = cpu.module[0](torch.tensor([text]))[:, 0, :256]
    for dtype in ("float32", "bfloat16"):
        stepper = Stepper(make_engine(dtype, "cuda", family=family))
        for length in (16, *range(17, 25)):
            got = stepper.logits(text[:length])
            assert got is not None
            want = want_SV[length - 1]
            if dtype == "float32":
                assert float((got.cpu() - want).abs().max() / want.abs().max()) < 1e-4
            else:  # single choices of experts turn: GLM-4.5's had 0.963 at one place
                assert float(torch.cosine_similarity(got.cpu(), want, dim=0)) > 0.9

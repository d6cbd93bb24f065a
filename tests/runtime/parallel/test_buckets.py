"""What buckets hold alive, and how gradients reach their sums."""

import gc
import weakref

import pytest
import torch

from runtime.parallel.gradient_sink import deliver_parts, sink_of
from runtime.parity.case import Case, global_batch, make_engine
from tests.support.launches import Launches

CASE = Case(name="one rank", num_ranks=1)


def test_an_engine_that_is_dropped_frees_its_memory() -> None:
    engine, _ = make_engine(CASE)
    engine.train_step(global_batch(CASE, 0))
    kept = [weakref.ref(parameter) for parameter in engine.module.parameters()]
    kept += [weakref.ref(shard.master) for shard in engine.store.shards]
    del engine
    gc.collect()
    assert [reference() for reference in kept if reference() is not None] == []


def test_experts_add_to_their_sums_and_leave_autograd_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    direct, _ = make_engine(CASE)
    through_autograd, _ = make_engine(CASE)
    for parameter in through_autograd.module.parameters():
        sink = sink_of(parameter)
        assert sink is not None
        monkeypatch.setattr(sink, "open", lambda: None)
    left: list[str] = []
    for name, parameter in direct.module.named_parameters():
        parameter.register_hook(lambda grad, name=name: None if grad is None else left.append(name))
    results = [engine.train_step(global_batch(CASE, 0)) for engine in (direct, through_autograd)]
    assert left
    assert not [name for name in left if "experts" in name]
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
    gradients = [{item.name: item.tensor for item in engine.gradients()} for engine in (direct, through_autograd)]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-8), name


def test_each_backward_pass_of_a_parameter_counts_once() -> None:
    engine, _ = make_engine(CASE)
    seen: list[list[int | None]] = []
    finish = engine.store.finish

    def look() -> None:
        seen.append([shard.pending.count for shard in engine.store.shards])  # type: ignore[attr-defined]
        finish()

    engine.store.finish = look  # type: ignore[method-assign]
    engine.train_step(global_batch(CASE, 0))
    assert set(seen[0]) == {0}, "what starts a bucket's reduction while the backward pass goes on"


def test_sums_start_anew_in_each_step() -> None:
    engine, _ = make_engine(CASE, lr=0.0, weight_decay=0.0)
    first, second = (engine.train_step(global_batch(CASE, 0)).grad_norm for _ in range(2))
    assert first == second


def test_a_first_gradient_in_parts_is_summed_up_where_it_belongs() -> None:
    engine, _ = make_engine(CASE)
    engine.train_step(global_batch(CASE, 0))  # leaves sums that the next step's first gradients overwrite
    weight = next(parameter for name, parameter in engine.module.named_parameters() if "norm" in name)
    sink, parts = sink_of(weight), torch.randn(5, *weight.shape)
    assert sink is not None
    engine.store.begin(2)
    for place, count in ((1, 1), (2, 2)):
        with torch.no_grad(), Launches() as launches:
            assert deliver_parts(sink, parts, weight) is None
        assert len(launches.names) == count, launches.names
        opened = sink.open()
        assert opened is not None
        assert not opened.fresh
        assert torch.equal(opened.total, place * parts.sum(0))
    torch.testing.assert_close(deliver_parts(None, parts, weight), parts.sum(0))


def test_norm_of_many_elements_is_that_of_fp64() -> None:
    """An fp32 sum of squares over a flat bucket loses 3e-4 of the norm at this size."""
    case = Case(name="large vocabulary", num_ranks=1, model={"vocab_size": 200_000}, num_microbatches=1)
    engine, _ = make_engine(case)
    engine.set_lr(0.0)
    result = engine.train_step(global_batch(case, 0))
    divisor = engine.optimizer.divisor
    assert divisor is not None
    norms = [(item.tensor.double() * divisor).norm() for item in engine.gradients()]
    assert result.grad_norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-7)

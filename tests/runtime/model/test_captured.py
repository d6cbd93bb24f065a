"""Micro-batches replayed as CUDA graphs: the same steps as without, and who may have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.data.batch import Batch
from runtime.fp8.config import Fp8Config
from runtime.model.batches import to_device
from runtime.model.captured import CapturedModel
from runtime.model.lora import LoraConfig
from runtime.ops.documents import Documents, Room
from runtime.parallel.buckets import BucketStore
from tests.runtime.model.wide import batch, make_engine, packed

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CASES: list[dict[str, Any]] = [
    {},
    *({"fp8": Fp8Config(format="hybrid", recipe=recipe)} for recipe in ("tensorwise", "delayed", "blockwise")),
    {"fp8": Fp8Config(format="e4m3", recipe="delayed"), "granularity": "full"},
    {"granularity": "full"},
    {"granularity": "selective"},
    {"recompute_layer": True},
    {"load_balancing": ("seq_aux_loss", "global_aux_loss")},
    {"aux_loss_mode": "hf"},
    {"capacity_factor": 1.0},
    {"family": "llama"},
    {"family": "qwen3_moe", "granularity": "full"},
    {"family": "gpt_oss"},
    {"family": "deepseek_v3"},
    {"lora": LoraConfig(rank=8, alpha=4.0, targets=("*self_attn*", "*experts*")), "granularity": "full"},
]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("make_batch", [batch, packed])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_replayed_steps_are_those_of_passes(options: dict[str, Any], make_batch: Callable[[int], Batch]) -> None:
    """Without an update losses are equal bit for bit; gradients, which attention sums by atomics, nearly."""
    plain, replayed = (
        make_engine("bfloat16", "cuda", captures=captures, lr=0.0, **options) for captures in (False, True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):  # of one and of three micro-batches
            batches = [make_batch(3 * step + place) for place in range(1 if step == 3 else 3)]
            want, got = plain.train_step(batches), replayed.train_step(batches)
            assert got.lm_loss == want.lm_loss
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-3)
            if want.routing is not None:
                assert got.routing is not None
                assert torch.equal(got.routing.load_LE, want.routing.load_LE)
                torch.testing.assert_close(got.routing.added_L, want.routing.added_L)
            for ours, theirs in zip(replayed.gradients(), plain.gradients(), strict=True):
                torch.testing.assert_close(ours.tensor, theirs.tensor, rtol=0.02, atol=1e-2 * float(want.grad_norm))
    graphs = [kind.graph for kind in replayed._runner._kinds.values()]  # type: ignore[attr-defined]
    assert sum(graph is not None for graph in graphs) >= 2


@pytest.mark.gpu
@gpu
def test_a_replay_sees_weights_and_rates_of_its_step() -> None:
    plain, replayed = (make_engine("bfloat16", "cuda", captures=captures) for captures in (False, True))
    losses = []
    for step in range(12):
        for engine in (plain, replayed):
            engine.set_lr(1e-2 if step < 6 else 1e-3)
        batches = [batch(0), batch(1)][: 1 + step % 2]
        want, got = plain.train_step(batches), replayed.train_step(batches)
        assert got.lm_loss == pytest.approx(want.lm_loss, rel=5e-3)
        losses.append(got.lm_loss)
    assert losses[-1] < losses[0] - 0.5
    assert replayed.evaluate([batch(0)]) == pytest.approx(plain.evaluate([batch(0)]), rel=5e-3)


@pytest.mark.gpu
@gpu
def test_what_cannot_be_captured_runs_as_usual() -> None:
    """The host reads the experts' rows in a loop over them, which a capture forbids."""
    plain, replayed = (
        make_engine("bfloat16", "cuda", captures=captures, gemm_backend="loop") for captures in (False, True)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            want, got = plain.train_step([batch(step)] * 2), replayed.train_step([batch(step)] * 2)
            assert got.lm_loss == pytest.approx(want.lm_loss, rel=5e-3)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=2e-2)
    assert sum("can't be captured as a CUDA graph" in str(item.message) for item in caught) == 1


@pytest.mark.gpu
@gpu
def test_an_evaluation_without_room_gets_that_of_the_graphs() -> None:
    engine = make_engine("bfloat16", "cuda", captures=True, lr=0.0)
    steps = [batch(0), batch(1)]
    for _ in range(3):
        want = engine.train_step(steps)
    long = [batch(2), batch(3)]
    expected = engine.evaluate(long)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        assert engine.evaluate(long) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for _ in range(3):
        assert engine.train_step(steps).lm_loss == want.lm_loss


def test_books_of_a_replay_are_those_of_its_capture() -> None:
    """What two micro-batches do to the buckets' books: once by backward passes, once as the first was counted."""
    engine = make_engine("float32", "cpu")
    store = engine.store
    assert isinstance(store, BucketStore)
    engine.train_step([batch(0)])
    store.begin(2)
    before = store.books()
    engine._runner.run([to_device(batch(0), engine.device)], backward=True)
    arrivals = store.arrivals_since(before)
    assert all(item.count == len(bucket.slots) for item, bucket in zip(arrivals, store._buckets, strict=True))
    once = store.books()
    store.book([replace(item, touched=frozenset()) for item in arrivals])
    assert all(bucket.pending.launched and bucket.pending.count == 0 for bucket in store._buckets)

    store.reopen(before)
    assert all(bucket.pending.untouched == {slot.start for slot in bucket.slots} for bucket in store._buckets)
    store.book(arrivals)
    assert store.books() == once


def test_captures_are_of_whole_replicas() -> None:
    engine = make_engine("float32", "cpu")
    CapturedModel(engine._runner, engine.store, engine.device)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="whole model"):
        CapturedModel(engine._runner, None, engine.device)  # type: ignore[arg-type]


def test_documents_go_over_to_others() -> None:
    """Tensors with room for more documents hold each batch's in turn, as new ones would, at the same place."""
    ids = [item.document_ids for item in map(packed, range(4)) if item.document_ids is not None]
    room = Room(64, 128)
    kept = Documents(ids[0], torch.device("cpu"), room)
    part = kept.part(0, 128)
    given = part.bounds(), part.mask(None), part.mask(7)
    for each in ids:
        plain = Documents(each, torch.device("cpu"))
        assert plain.room().documents <= room.documents
        kept.take(plain)
        fresh = plain.part(0, 128)
        num = len(fresh.bounds().queries)
        ours, theirs = given[0], fresh.bounds()
        assert torch.equal(ours.queries[:num], theirs.queries)
        assert torch.equal(ours.keys[:num], theirs.keys)
        assert ours.most_queries >= theirs.most_queries
        assert ours.most_keys >= theirs.most_keys
        assert bool((ours.keys[num:] == each.numel()).all()), "what the room is kept for has no positions"
        assert torch.equal(given[1], fresh.mask(None))
        assert torch.equal(given[2], fresh.mask(7))

"""Documents that share rows against each document alone: through transformers, and through the trainer itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.data.batch import IGNORED_LABEL, Batch
from tests.runtime.model.hub import hub_tensors
from tests.runtime.model.test_transformers import ROPES, make_engine, make_model, relative

TOLERANCE = 1e-5
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("mixtral", {}, "none"),
    "mixtral-window": ("mixtral", {"sliding_window": 5}, "full"),
    "gpt_oss-sinks": ("gpt_oss", {"sliding_window": 4}, "selective"),
    "deepseek_v3-latent": ("deepseek_v3", {}, "selective"),
    "flex_olmo-norms-last": ("flex_olmo", {}, "none"),
    # The rows are longer than what its positions were made for, the documents on both sides of that.
    "phimoe-longrope": (
        "phimoe",
        {"rope_scaling": ROPES["longrope"] | {"short_mscale": 1.1, "long_mscale": 1.3}, "max_position_embeddings": 64},
        "none",
    ),
}
ROWS = ((7, 1, 12), (9, 11))
"""Tokens of the documents of each row."""


def documents() -> list[list[tuple[Tensor, Tensor]]]:
    """Tokens and labels of each row's documents: the last label of a document is none of its own, and one is left out."""
    generator = torch.Generator().manual_seed(1)
    out: list[list[tuple[Tensor, Tensor]]] = []
    for row in ROWS:
        out.append([])
        for length in row:
            tokens = torch.randint(101, (length,), generator=generator)
            labels = torch.cat([tokens[1:], torch.randint(101, (1,), generator=generator)])
            labels[length // 3] = IGNORED_LABEL
            out[-1].append((tokens, labels))
    return out


def packed(rows: list[list[tuple[Tensor, Tensor]]]) -> Batch:
    numbers = [torch.cat([torch.full((len(t),), n) for n, (t, _) in enumerate(row)]) for row in rows]
    return Batch(
        tokens=torch.stack([torch.cat([tokens for tokens, _ in row]) for row in rows]),
        labels=torch.stack([torch.cat([labels for _, labels in row]) for row in rows]),
        position_ids=torch.stack([torch.cat([torch.arange(len(tokens)) for tokens, _ in row]) for row in rows]),
        document_ids=torch.stack(numbers).to(torch.int32),
    )


# One row of Phi's is left out: its routers' gradients are so small there that the rounding of either side shows.
@pytest.mark.parametrize(
    ("name", "num_rows"), [(name, n) for name in CASES for n in (2, 1) if (name, n) != ("phimoe-longrope", 1)]
)
def test_packed_equals_each_document_alone(name: str, num_rows: int) -> None:
    model_type, options, granularity = CASES[name]
    model = make_model(model_type, **options)
    rows = documents()[:num_rows]
    alone = [document for row in rows for document in row]
    num_labels = sum(int((labels != IGNORED_LABEL).sum()) for _, labels in alone)
    loss = torch.zeros(())
    ours: dict[str, Tensor] = {}
    for tokens, labels in alone:
        logits = model(tokens[None]).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_labels
        engine = make_engine(model)
        if count := int((labels != IGNORED_LABEL).sum()):
            engine.train_step([Batch(tokens=tokens[None], labels=labels[None])])
            for item in engine.gradients():
                ours[item.name] = ours.get(item.name, 0) + item.tensor * (count / num_labels)
    loss.backward()  # type: ignore[no-untyped-call]
    want = hub_tensors(model, lambda p: p.grad)

    engine = make_engine(model, granularity=granularity)
    result = engine.train_step([packed(rows)])
    assert result.lm_loss == pytest.approx(loss.item(), rel=1e-6)
    got = {item.name: item.tensor for item in engine.gradients()}
    for other in (want, ours):
        assert got.keys() == other.keys()
        errors = {key: relative(got[key], other[key]) for key in other}
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v > 1e-6}


def test_masks_and_positions_change_the_loss() -> None:
    """What the comparisons above would miss if masks or positions did nothing."""
    model, batch = make_model("mixtral"), packed(documents())

    def loss(**given: Tensor | None) -> float:
        return make_engine(model).evaluate([Batch(tokens=batch.tokens, labels=batch.labels, **given)])

    neither, positions = loss(), loss(position_ids=batch.position_ids)
    masked = loss(document_ids=batch.document_ids)
    assert min(abs(neither - positions), abs(positions - masked), abs(neither - masked)) > 1e-4
    # Rotary positions are relative: within a document it is all the same where they begin.
    assert loss(position_ids=batch.position_ids, document_ids=batch.document_ids) == pytest.approx(masked, rel=1e-6)

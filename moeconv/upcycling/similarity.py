"""How alike the experts of a mixture are."""

from __future__ import annotations

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.layout.rect import Rect

_SAMPLED_ROWS = 512  # of all experts of a layer together


def similarity(mixture: Checkpoint) -> dict[int, float]:
    """Measure how alike the experts of each layer are: the mean cosine over pairs, on a sample of the first rows of their gate matrices.

    Args:
        mixture: a checkpoint with experts.

    Returns:
        By layer, rounded to 4 digits; 1 for a layer of one expert.
    """
    experts, width = mixture.model.sizes["experts"], mixture.model.width("expert")
    rows = min(width, max(4, _SAMPLED_ROWS // experts))
    out = {}
    for layer in sorted(mixture.model.moe_layers):
        vectors = []
        for expert in range(experts):
            name = mixture.model.tensor("expert.gate", layer, expert).name
            part = mixture.read(name, Rect((0, 0), (rows, mixture.tensors[name].shape[1])))
            vector = part.astype(np.float64).reshape(-1)
            vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-30))
        total = np.square(np.sum(vectors, axis=0)).sum()  # the sum over all pairs, each expert with itself included
        pairs = experts * (experts - 1)
        out[layer] = round(float((total - experts) / pairs), 4) if pairs else 1.0
    return out

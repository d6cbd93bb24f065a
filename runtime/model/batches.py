"""From a batch of the data to what a model takes."""

from __future__ import annotations

from dataclasses import replace

import torch

from runtime.data.batch import Batch
from runtime.ops.documents import Documents
from runtime.parallel.runner import Microbatch


def to_device(batch: Batch, device: torch.device) -> Microbatch:
    """Bring a batch to a device.

    Args:
        batch: on the host.
        device: where the model computes.

    Returns:
        The micro-batch. Document numbers stay on the host: what attention needs of them is found out there.
    """
    moved = replace(batch, document_ids=None).to(device)
    documents = Documents(batch.document_ids, device) if batch.document_ids is not None else None
    return Microbatch(tokens=moved.tokens, labels=moved.labels, more=(moved.position_ids, documents))

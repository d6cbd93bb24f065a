"""From logits to a token: the likeliest, or one that is drawn.

Legend: V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def probabilities(logits_V: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Give the probabilities that tokens are drawn with.

    Args:
        logits_V: [V] finite.
        temperature: above 0.
        top_k: among how many of the likeliest; 0 is all.
        top_p: among the likeliest that together have this probability, after the two others.

    Returns:
        [V] fp64.

    Source:
        https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/generation/logits_process.py
        (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper): the order, and which token the border takes in.
    """
    scaled_V = logits_V.double() / temperature
    if 0 < top_k < scaled_V.numel():
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        rising, order = scaled_V.sort()
        left_out = rising.softmax(0).cumsum(0) <= 1 - top_p
        left_out[-1] = False  # the likeliest
        scaled_V = scaled_V.masked_fill(torch.zeros_like(left_out).scatter(0, order, left_out), -torch.inf)
    return scaled_V.softmax(0)


class Sampler:
    """Chooses the tokens of one text; the same seed and number give the same ones, whatever else is written."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int, number: int) -> None:
        """Begin a text.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_k: as for `probabilities`.
            top_p: as for `probabilities`.
            seed: of the run.
            number: which text of the run it is.
        """
        self._how = (temperature, top_k, top_p)
        digest = hashlib.sha256(repr((seed, number)).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def choose(self, logits_V: Tensor) -> int:
        """Choose a token.

        Args:
            logits_V: [V] finite, on any device.

        Returns:
            Its id.
        """
        if self._how[0] == 0:
            return int(logits_V.float().argmax())
        drawn = torch.multinomial(probabilities(logits_V.cpu(), *self._how), 1, generator=self._generator)
        return int(drawn)

"""Captions token by token from an encoder, each predicted from a trailing mask token (BEiT-3).

What an earlier position computes never changes with later ones, since the image sees itself alone and a token the
image and the text up to itself: keys and values are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..torchscale_ext.beit3 import MultiwayBEiT3
from ..torchscale_ext.multiway_attention import KeyValueCache

MASK_SYMBOL = "<mask>"


@dataclass
class CaptionState:
    """Images and the captions so far, a row each.

    Attributes:
        caches: keys and values of each layer.
        num_tokens: length of the captions so far.
    """

    caches: list[KeyValueCache]
    num_tokens: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Follow beam search: row ``i`` becomes what row ``rows[i]`` was; there may be more rows than before."""
        for cache in self.caches:
            cache.reorder(rows)


class WritesCaptions(nn.Module):
    """Among a model's bases: incremental decoding."""

    beit3: MultiwayBEiT3
    dictionary: Dictionary
    autocast: Any
    text_logits: Any

    @torch.no_grad()
    def start_captions(self, images: Tensor) -> CaptionState:
        """Read ``(B, 3, H, W)`` images; no token has been written."""
        state = CaptionState([KeyValueCache() for _ in self.beit3.encoder.layers])
        with self.autocast(images.device.type):
            self.beit3(images=images, caches=state.caches)
        return state

    @torch.no_grad()
    def next_token_logits(self, state: CaptionState, tokens: Tensor) -> Tensor:
        """Append a token to every caption, and score the next one.

        Args:
            state: updated.
            tokens: ``(B,)``, the first time the beginning-of-sentence symbol.

        Returns:
            ``(B, vocabulary)``, those of ``<mask>`` in the next place.

        Raises:
            ValueError: if the next token would be longer than ``--max-text-length``.
        """
        start = state.num_tokens
        pairs = torch.stack([tokens, torch.full_like(tokens, self.dictionary.index(MASK_SYMBOL))], dim=1)
        keys = 1 + self.beit3.vision_embed.num_patches + start + 2
        visible = torch.ones(2, keys, dtype=torch.bool, device=tokens.device)
        visible[0, -1] = False  # the token does not see the mask, which is not of the caption
        with self.autocast(tokens.device.type):
            features, _ = self.beit3.step(pairs, start, visible, state.caches)
        for cache in state.caches:
            cache.drop_last()
        state.num_tokens += 1
        return self.text_logits(features[:, -1])

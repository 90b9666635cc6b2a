"""BEiT-3: images and texts, embedded and joined, through one encoder.

Parameter names are those of TorchScale's ``BEiT3``, whose own constructor cannot build an encoder with experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchscale.component.embedding import PositionalEmbedding, TextEmbedding, VisionEmbedding

from ..common.errors import UserError
from .attention import KeyValueCache, visible_keys
from .encoder import MultiwayEncoder
from .settings import UNUSED_POSITIONS, EncoderSettings, Multiway

# BEiT's; TorchScale leaves mask and class token at zero and draws positions with deviation 1.
INITIAL_DEVIATION = 0.02


class MultiwayBEiT3(nn.Module):
    """Features of an image, a text, or both in one sequence ``[cls | patches, row by row | text]``.

    Args:
        settings: everything about the model.
        padding_index: the padding symbol.
    """

    def __init__(self, settings: EncoderSettings, padding_index: int) -> None:
        super().__init__()
        self.settings = settings
        self.padding_index = padding_index
        width = settings.encoder_embed_dim
        self.text_embed = TextEmbedding(settings.vocab_size, width, padding_idx=padding_index)
        self.vision_embed = VisionEmbedding(
            settings.img_size,
            settings.patch_size,
            settings.in_chans,
            width,
            contain_mask_token=True,
            prepend_cls_token=True,
        )
        positions = Multiway(
            PositionalEmbedding(self.vision_embed.num_position_embeddings() + UNUSED_POSITIONS, width),
            PositionalEmbedding(settings.max_source_positions, width),
        )
        self.encoder = MultiwayEncoder(settings, positions)
        vision = self.vision_embed
        for parameter in (vision.mask_token, vision.cls_token, *positions.parameters()):
            nn.init.normal_(parameter, std=INITIAL_DEVIATION)

    def forward(
        self,
        text_tokens: Tensor | None = None,
        images: Tensor | None = None,
        masked_patches: Tensor | None = None,
        attention: str = "full",
        caches: Sequence[KeyValueCache] | None = None,
        normalize_output: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features of every position.

        Args:
            text_tokens: ``(B, S)``, the padding symbol where padded.
            images: ``(B, 3, H, W)`` of the model's size.
            masked_patches: bool ``(B, patches)``, True where the mask token replaces the patch.
            attention: ``full`` or ``caption``, see ``visible_keys``.
            caches: one for each layer, empty: keys and values are kept in them.
            normalize_output: whether the final norm is applied.

        Returns:
            ``(B, L, D)``; and the encoder's ``extra`` with ``padding_mask`` (bool ``(B, L)``, None
            without a text) and ``image_positions``, L's first, 0 without an image.

        Raises:
            UserError: if neither is given, for an image of another size or a text that is too long.
        """
        parts = []
        if images is not None:
            parts.append(self.embed_images(images, masked_patches))
        if text_tokens is not None:
            parts.append(self.embed_text(text_tokens))
        if not parts:
            raise ValueError("text_tokens or images: give one, or both")
        x = torch.cat(parts, dim=1)
        image_length = 0 if images is None else parts[0].size(1)
        padding_mask = None
        if text_tokens is not None:
            padding_mask = nn.functional.pad(text_tokens.eq(self.padding_index), (image_length, 0))
        visible = visible_keys(attention, image_length, x.size(1), padding_mask, x.device)
        x, extra = self.encoder(x, image_length, padding_mask, visible, caches, normalize_output)
        return x, {**extra, "padding_mask": padding_mask, "image_positions": image_length}

    def embed_images(self, images: Tensor, masked_patches: Tensor | None = None) -> Tensor:
        """``(B, 3, H, W) -> (B, 1 + patches, D)`` with positions, the class token first."""
        size = self.settings.img_size
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise UserError(f"an image of {width}x{height} pixels; the model's --img-size is {size}")
        x = self.vision_embed(images, masked_patches)
        return x + self.encoder.embed_positions.A.weight[UNUSED_POSITIONS:]

    def embed_text(self, tokens: Tensor, start: int = 0) -> Tensor:
        """``(B, S) -> (B, S, D)`` with the positions ``start, start + 1, ...``."""
        end = start + tokens.size(1)
        if end > self.settings.max_text_length:
            raise UserError(f"a text of {end} tokens; --max-text-length is {self.settings.max_text_length}")
        positions = self.encoder.embed_positions.B.weight
        return self.text_embed(tokens) + positions[UNUSED_POSITIONS + start : UNUSED_POSITIONS + end]

"""Modules with one set of weights for images and another for text, as TorchScale's multiway networks; attention, too.

A sequence is ``[image positions | text positions]``; ``image_length`` says how many of its positions are the image's.
It is an argument everywhere: TorchScale keeps it in an attribute of every module, which the next call overwrites. So
TorchScale is told to build for one modality, and what it built gives way to these modules.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchscale.component.multihead_attention import MultiheadAttention

from .settings import EncoderSettings

ATTENTION_KINDS = ("full", "caption")


class Multiway(nn.Module):
    """``A`` for the image's positions, ``B`` for the text's; parameter names are TorchScale's.

    A modality without positions does not call its module, so a batch of images leaves the text's weights without
    gradients.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.A = image
        self.B = text

    def forward(self, x: Tensor, image_length: int) -> Tensor:
        """``(B, L, ...) -> (B, L, ...)``, of which the first ``image_length`` positions go through A."""
        if image_length == x.size(1):
            return self.A(x)
        if image_length == 0:
            return self.B(x)
        return torch.cat([self.A(x[:, :image_length]), self.B(x[:, image_length:])], dim=1)


def build_multiway(build: Callable[[], nn.Module]) -> Multiway:
    """A module for each modality, with initial values of their own."""
    return Multiway(build(), build())


class KeyValueCache:
    """The keys and values of earlier steps, ``(B, heads, S, d)``; empty at first."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values

    def drop_last(self) -> None:
        """Forget the last position."""
        assert self._keys is not None and self._values is not None, "an empty cache"
        self._keys, self._values = self._keys[:, :, :-1], self._values[:, :, :-1]

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; there may be more rows than before, or fewer."""
        assert self._keys is not None and self._values is not None, "an empty cache"
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)


class MultiwaySelfAttention(MultiheadAttention):
    """Multi-head self-attention with maps and norm for each modality; TorchScale's parameters and results, any mask."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__(
            settings,
            settings.encoder_embed_dim,
            settings.encoder_attention_heads,
            dropout=settings.attention_dropout,
            self_attention=True,
            subln=settings.subln,
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, build_multiway(lambda: nn.Linear(self.embed_dim, self.embed_dim)))
        if self.inner_attn_ln is not None:
            self.inner_attn_ln = build_multiway(lambda: settings.build_norm(self.embed_dim))
        settings.without_biases(self)

    def forward(
        self, x: Tensor, image_length: int, visible: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(B, L, D)``, of which the first ``image_length`` positions are the image's.
            visible: bool, broadcastable to ``(B, heads, L, keys)``, True where a query sees a key; every query sees
                at least one. None: all see all.
            cache: earlier steps' keys, which come before ``x``'s; extended.

        Returns:
            ``(B, L, D)``.
        """
        q, k, v = (self._heads(project(x, image_length)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dropout_module.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        attended = attended.transpose(1, 2).reshape(x.shape)
        if self.inner_attn_ln is not None:
            attended = self.inner_attn_ln(attended, image_length)
        return self.out_proj(attended, image_length)

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, L, D) -> (B, heads, L, d)``."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)


def visible_keys(
    attention: str, image_length: int, length: int, padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys a query sees, for ``MultiwaySelfAttention``; None for all.

    Args:
        attention: ``full``: everything; ``caption``: the image sees the image, a text token the image and the text up
            to itself.
        image_length: the image's positions, of ``length`` altogether.
        padding_mask: bool ``(B, length)``, True where padded; such keys are not seen, but where a query would see none
            at all, it sees everything, since nobody reads its result: a softmax over nothing is NaN.

    Raises:
        ValueError: for any other ``attention``.
    """
    if attention not in ATTENTION_KINDS:
        raise ValueError(f"attention ({attention!r}) must be one of {', '.join(ATTENTION_KINDS)}")
    if attention == "full":
        if padding_mask is None:
            return None
        nothing_real = padding_mask.all(dim=1, keepdim=True)
        return (~padding_mask | nothing_real)[:, None, None, :]
    positions = torch.arange(length, device=device)
    in_image = positions < image_length
    visible = in_image[None, :] | (~in_image[:, None] & (positions[None, :] <= positions[:, None]))
    if padding_mask is None:
        return visible
    itself = torch.eye(length, dtype=torch.bool, device=device)
    return (visible & ~padding_mask[:, None, None, :]) | itself

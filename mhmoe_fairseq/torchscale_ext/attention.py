"""Self-attention with TorchScale's parameters and results, computed by ``scaled_dot_product_attention``."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchscale.component.multihead_attention import MultiheadAttention

from .positions import RotaryPositions
from .settings import DecoderSettings


class SelfAttention(MultiheadAttention):
    """Multi-head self-attention; parameter names and values are those of TorchScale's ``MultiheadAttention``.

    Adds rotary positions, RMSNorm as sub-LN, bias-free maps and a causal mode without a mask tensor. Attention
    weights are never materialised, so the second result is None.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__(
            settings,
            settings.decoder_embed_dim,
            settings.decoder_attention_heads,
            dropout=settings.attention_dropout,
            self_attention=True,
            subln=settings.subln,
        )
        self.rotary: RotaryPositions | None = None
        if settings.rotary_embed:
            self.rotary = RotaryPositions(self.head_dim, settings.max_target_positions)
        if self.inner_attn_ln is not None and settings.rms_norm:
            self.inner_attn_ln = settings.build_norm(self.embed_dim)
        settings.without_biases(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        incremental_state: dict | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: ``(B, S, D)``; ``key`` and ``value`` are the same tensor and may be left out.
            incremental_state: holds the keys and values of earlier steps, ``(B, heads, S', d)``; updated.
            key_padding_mask: bool ``(B, keys)``, True = never attend to it. A query without any key gets zeros.
            attn_mask: ``(S, keys)`` added to the scores, such as -inf above the diagonal.
            is_causal: a query sees no later key; with an incremental state, for a whole prefix at the first step.

        Returns:
            ``(B, S, D)`` and None.
        """
        q, k, v = (self._split(p(query)) for p in (self.q_proj, self.k_proj, self.v_proj))
        past = 0
        if incremental_state is not None and "prev_key" in incremental_state:
            past = incremental_state["prev_key"].size(2)
        if self.rotary is not None:
            q, k = self.rotary(q, past), self.rotary(k, past)
        if incremental_state is not None:
            if past:
                k = torch.cat([incremental_state["prev_key"], k], dim=2)
                v = torch.cat([incremental_state["prev_value"], v], dim=2)
            incremental_state["prev_key"], incremental_state["prev_value"] = k, v
        if self.xpos is not None:
            q, k = self._rotate_xpos(q, k, past)

        mask = self._additive_mask(q, k, key_padding_mask, attn_mask, is_causal)
        attended = F.scaled_dot_product_attention(
            q.type_as(v),
            k.type_as(v),
            v,
            attn_mask=mask,
            dropout_p=self.dropout_module.p if self.training else 0.0,
            is_causal=is_causal and mask is None,
        )
        attended = attended.transpose(1, 2).reshape(query.shape)
        if self.inner_attn_ln is not None:
            attended = self.inner_attn_ln(attended)
        return self.out_proj(attended), None

    def _split(self, x: Tensor) -> Tensor:
        """``(B, S, D) -> (B, heads, S, d)``."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).transpose(1, 2)

    def _rotate_xpos(self, q: Tensor, k: Tensor, past: int) -> tuple[Tensor, Tensor]:
        # TorchScale's module takes (rows, S, d) and centres its scale on the keys' length, so cached keys stay
        # unrotated and all of them are rotated at every step.
        k_rotated = self.xpos(k.flatten(0, 1), offset=0, downscale=True).view_as(k)
        q_rotated = self.xpos(q.flatten(0, 1), offset=past, downscale=False).view_as(q)
        return q_rotated, k_rotated

    def _additive_mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """All masks as one ``(B or 1, 1, S, keys)`` tensor to add; None if there is none but causality."""
        if key_padding_mask is None and attn_mask is None:
            return None
        queries, keys = q.size(2), k.size(2)
        mask = q.new_zeros(1, 1, queries, keys)
        if attn_mask is not None:
            mask = mask + attn_mask
        if is_causal:
            later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
            mask = mask.masked_fill(later, float("-inf"))
        if key_padding_mask is not None:
            mask = mask.masked_fill(key_padding_mask[:, None, None, :].bool(), float("-inf"))
        return mask

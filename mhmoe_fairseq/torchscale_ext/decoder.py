"""A TorchScale decoder built from MH-MoE decoder layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchscale.architecture.decoder import Decoder

from .decoder_layer import MHMoEDecoderLayer
from .modules import build_norm
from .settings import DecoderSettings


class MHMoEDecoder(Decoder):
    """Decoder-only transformer with an MoE layer every ``moe_freq`` layers.

    Args:
        settings: everything about the layers.
        embed_tokens: token embedding with its ``padding_idx``.
        embed_positions: module called with the ``(B, S)`` tokens, or None.
        kwargs: passed to the next class of a multiple inheritance.

    TorchScale rescales the initial weights by name under sub-LN and deepnorm: the experts' ``fc1_weight`` and
    ``fc2_weight`` are rescaled like a dense network's; routers, SwiGLU gates and the head and merge projections,
    which no such rule was derived for, are not.
    """

    def __init__(
        self, settings: DecoderSettings, embed_tokens: nn.Embedding, embed_positions: nn.Module | None, **kwargs: Any
    ) -> None:
        super().__init__(settings, embed_tokens, embed_positions, **kwargs)
        for name in ("layer_norm", "layernorm_embedding"):
            if getattr(self, name) is not None:
                setattr(self, name, build_norm(settings, self.embed_dim))

    def build_decoder_layer(
        self, args: DecoderSettings, depth: int, is_moe_layer: bool = False, is_encoder_decoder: bool = False
    ) -> nn.Module:
        """TorchScale's seam: our layer. Activation checkpointing is done in ``forward``."""
        return MHMoEDecoderLayer(args, depth, is_moe_layer)

    def forward(
        self,
        prev_output_tokens: Tensor,
        self_attn_padding_mask: Tensor | None = None,
        encoder_out: None = None,
        incremental_state: dict | None = None,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits for every position.

        Args:
            prev_output_tokens: ``(B, S)``, padded on the right; in incremental decoding all tokens so far.
            self_attn_padding_mask: bool ``(B, S)``, True = padded. By default the padding symbol's places, which the
                MoE layers leave out and causal attention never reaches; one that is given is masked in attention
                too, as left padding needs.
            encoder_out: None; there is no encoder.
            incremental_state: a dictionary kept between steps: layer index -> past keys and values. With
                ``{"is_first_step": True}`` the first call takes a whole prefix.
            features_only: leave out the output projection.
            return_all_hiddens: keep every layer's output in ``extra["inner_states"]``.
            token_embeddings: ``(B, S, D)`` in place of the embedding's.

        Returns:
            ``(B, S, vocabulary)`` logits or ``(B, S, D)`` features, and ``extra`` with one entry per layer (None for
            dense ones) in ``l_aux``, ``stack([balance, z])``, and ``moe_stats``, a ``RoutingStats``; under expert
            parallelism in ``moe_traffic``, too, a ``Traffic``.
        """
        x, _ = self.forward_embedding(prev_output_tokens, token_embeddings, incremental_state)
        is_first_step = self.is_first_step(incremental_state)
        padding_mask = self_attn_padding_mask
        if padding_mask is None:
            padding_mask = prev_output_tokens.eq(self.embed_tokens.padding_idx)
        padding_mask = padding_mask[:, -x.size(1) :]  # incremental decoding: the mask spans all keys, x one token

        inner_states, l_aux, moe_stats, moe_traffic = [x], [], [], []
        for index, layer in enumerate(self.layers):
            layer_state = None if incremental_state is None else incremental_state.setdefault(index, {})
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self._recomputes() else layer
            x, layer_aux = run(
                x,
                incremental_state=layer_state,
                padding_mask=padding_mask,
                key_padding_mask=self_attn_padding_mask,
                is_first_step=is_first_step,
            )
            l_aux.append(layer_aux)
            moe_stats.append(layer.moe_stats if layer.is_moe_layer else None)
            moe_traffic.append(layer.moe_traffic)
            if return_all_hiddens:
                inner_states.append(x)

        if self.layer_norm is not None:
            x = self.layer_norm(x)
        if not features_only:
            x = self.output_layer(x)
        extra = {"l_aux": l_aux, "moe_stats": moe_stats, "moe_traffic": moe_traffic}
        return x, {"inner_states": inner_states, "attn": None, **extra}

    def _recomputes(self) -> bool:
        # torch's own checkpointing, not fairscale's: that one recomputes outside bf16 autocast.
        return self.args.checkpoint_activations and self.training and torch.is_grad_enabled()

    def reorder_incremental_state_scripting(self, incremental_state: dict, new_order: Tensor) -> None:
        """Follow beam search: row ``i`` of every cached tensor becomes row ``new_order[i]``."""
        for layer_state in incremental_state.values():
            if isinstance(layer_state, dict):
                for name, cached in layer_state.items():
                    layer_state[name] = cached.index_select(0, new_order)

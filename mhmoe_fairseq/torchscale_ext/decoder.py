"""A TorchScale decoder and its layers, whose feed-forward part may be an MH-MoE layer."""

from typing import Any

from torch import Tensor, nn
from torchscale.architecture.decoder import Decoder, DecoderLayer

from ..moe import MHMoEOutput
from .attention import SelfAttention
from .feed_forward import build_dense_ffn
from .settings import DecoderSettings
from .stack import MoELayerParts, pass_through, replace_norms


class MHMoEDecoderLayer(MoELayerParts, DecoderLayer):
    """Self-attention and a feed-forward part: a dense network or experts."""

    def __init__(self, settings: DecoderSettings, depth: int, is_moe_layer: bool = False) -> None:
        super().__init__(settings, depth, is_moe_layer=False)
        self.finish(settings, is_moe_layer, lambda: settings.build_norm(self.embed_dim))

    def build_self_attention(self, embed_dim: int, args: DecoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return SelfAttention(args)

    def build_ffn(self, embed_dim: int, args: DecoderSettings) -> nn.Module:
        """TorchScale's seam: the dense feed-forward network."""
        return build_dense_ffn(args, embed_dim, self.ffn_dim)

    def forward(
        self,
        x: Tensor,
        incremental_state: dict | None = None,
        padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_first_step: bool = False,
    ) -> tuple[Tensor, MHMoEOutput | None]:
        """One layer, pre-norm or post-norm as the settings say.

        Args:
            x: ``(B, S, D)``; in incremental decoding S is 1, or the prefix's length at the first step.
            incremental_state: this layer's own dictionary of past keys and values, or None.
            padding_mask: bool ``(B, S)``, True = padded: such tokens are not routed to experts.
            key_padding_mask: bool ``(B, all keys)``, True = never attended to. Right padding needs none: a causal
                query sees no later key.
            is_first_step: the incremental state is empty and the whole prefix comes at once.

        Returns:
            ``(B, S, D)``, and losses, statistics and traffic of the experts, or None for a dense layer.
        """
        attended, _ = self.self_attn(
            self.before(self.self_attn_layer_norm, x),
            incremental_state=incremental_state,
            key_padding_mask=key_padding_mask,
            is_causal=incremental_state is None or is_first_step,
        )
        x = self.after(self.self_attn_layer_norm, x, self.dropout_module(attended))
        return self.feed_forward(x, padding_mask)


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
        replace_norms(self, ("layer_norm", "layernorm_embedding"), lambda: settings.build_norm(self.embed_dim))

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
            self_attn_padding_mask: bool ``(B, S)``, True = padded. By default the padding symbol's positions, which
                the MoE layers leave out and causal attention never reaches; one that is given is masked in attention
                too, as left padding needs.
            encoder_out: None; there is no encoder.
            incremental_state: a dictionary kept between steps: layer index -> past keys and values. With
                ``{"is_first_step": True}`` the first call takes a whole prefix.
            features_only: leave out the output projection.
            return_all_hiddens: keep every layer's output in ``extra["inner_states"]``.
            token_embeddings: ``(B, S, D)`` in place of the embedding's.

        Returns:
            ``(B, S, vocabulary)`` logits or ``(B, S, D)`` features, and ``extra`` with one entry per layer in
            ``moe``: an ``MHMoEOutput`` without its hidden part, None for a dense layer.
        """
        x, _ = self.forward_embedding(prev_output_tokens, token_embeddings, incremental_state)
        is_first_step = self.is_first_step(incremental_state)
        padding_mask = self_attn_padding_mask
        if padding_mask is None:
            padding_mask = prev_output_tokens.eq(self.embed_tokens.padding_idx)
        padding_mask = padding_mask[:, -x.size(1) :]  # incremental decoding: the mask spans all keys, x one token

        inner_states, outputs = [x], []
        for index, layer in enumerate(self.layers):
            x, output = pass_through(
                self,
                layer,
                x,
                incremental_state=None if incremental_state is None else incremental_state.setdefault(index, {}),
                padding_mask=padding_mask,
                key_padding_mask=self_attn_padding_mask,
                is_first_step=is_first_step,
            )
            outputs.append(output)
            if return_all_hiddens:
                inner_states.append(x)

        if self.layer_norm is not None:
            x = self.layer_norm(x)
        if not features_only:
            x = self.output_layer(x)
        return x, {"inner_states": inner_states, "attn": None, "moe": outputs}

    def reorder_incremental_state_scripting(self, incremental_state: dict, new_order: Tensor) -> None:
        """Follow beam search: row ``i`` of every cached tensor becomes row ``new_order[i]``."""
        for layer_state in incremental_state.values():
            if isinstance(layer_state, dict):
                for name, cached in layer_state.items():
                    layer_state[name] = cached.index_select(0, new_order)

"""TorchScale's decoder with MH-MoE layers."""

from typing import Any

from torch import Tensor, nn
from torchscale.architecture.decoder import Decoder

from .attention import KeyValueCache, visible_keys
from .layers import MHMoEDecoderLayer, pass_through
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
        settings.replace_norms(self, "layer_norm", "layernorm_embedding")

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
        domain: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits for every position.

        Args:
            prev_output_tokens: ``(B, S)``, padded on the right; in incremental decoding all tokens so far.
            self_attn_padding_mask: bool ``(B, S)``, True = padded. By default the padding symbol's positions, which
                the MoE layers leave out and causal attention never reaches; one that is given is masked in attention
                too, as left padding needs.
            incremental_state: a dictionary kept between steps: layer index -> ``KeyValueCache``. With
                ``{"is_first_step": True}`` the first call takes a whole prefix.
            features_only: leave out the output projection.
            return_all_hiddens: keep every layer's output in ``extra["inner_states"]``.
            token_embeddings: ``(B, S, D)`` in place of the embedding's.
            domain: int64 ``(B, S)``, the expert of every position, for ``router="domain"``.

        Returns:
            ``(B, S, vocabulary)`` logits or ``(B, S, D)`` features, and ``extra`` with one entry per layer in
            ``moe``: an ``MHMoEOutput`` without its hidden part, None for a dense layer.
        """
        x, _ = self.forward_embedding(prev_output_tokens, token_embeddings, incremental_state)
        is_causal = incremental_state is None or self.is_first_step(incremental_state)
        padding_mask, visible = self_attn_padding_mask, None
        if padding_mask is None:
            padding_mask = prev_output_tokens.eq(self.embed_tokens.padding_idx)
        else:
            padding_mask, kind = padding_mask.bool(), "caption" if is_causal else "full"
            visible = visible_keys(kind, 0, padding_mask.size(1), padding_mask, padding_mask.device)
        if domain is not None:
            domain = domain[:, -x.size(1) :]
        padding_mask = padding_mask[:, -x.size(1) :]  # incremental decoding: the mask spans all keys, x one token

        inner_states, outputs = [x], []
        masks = {"padding_mask": padding_mask, "visible": visible, "is_causal": is_causal, "domain": domain}
        for index, layer in enumerate(self.layers):
            cache = None if incremental_state is None else incremental_state.setdefault(index, KeyValueCache())
            x, output = pass_through(self, layer, x, **masks, cache=cache)
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
        for cache in incremental_state.values():
            if isinstance(cache, KeyValueCache):
                cache.reorder(new_order)

"""The plain decoder: what the options say, formula by formula, in evaluation; parameters are the model's.

Written from the options and not from the model's attributes; a part that the options leave out is never looked at.
"""

import math
from typing import Any

import moe_oracle
import torch
from torch import Tensor, nn

EPS = 1e-5
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + (-x).exp()),
}


class PlainDecoder:
    """Logits of right-padded rows without padding.

    Args:
        decoder: a language model's, of which only parameters are read.
        options: those that the model was built from.

    Attributes:
        losses: ``(balance, z)`` of each MoE layer that has run.
    """

    def __init__(self, decoder: nn.Module, options: Any) -> None:
        self.decoder, self.options = decoder, options
        self.has_subln = bool(options.subln) or not (options.no_subln or options.rms_norm or options.deepnorm)
        self.losses: list[Tensor] = []
        self.alpha = (2 * options.decoder_layers) ** 0.25 if options.deepnorm else 1.0

    def logits(self, tokens: Tensor) -> Tensor:
        """``(B, S) -> (B, S, vocabulary)``."""
        decoder, options = self.decoder, self.options
        x = self.embed(tokens)
        for index, layer in enumerate(decoder.layers):
            x = self.block(x, layer.self_attn_layer_norm, lambda x, layer=layer: self.attend(layer.self_attn, x))
            is_moe = bool(options.moe_freq) and (index + 1) % options.moe_freq == 0
            forward = self.route if is_moe else self.dense
            x = self.block(x, layer.final_layer_norm, lambda x, layer=layer, forward=forward: forward(layer, x))
        if not options.deepnorm:
            x = self.norm(x, decoder.layer_norm)
        output = decoder.output_projection if options.no_share_decoder_input_output_embed else decoder.embed_tokens
        return x @ output.weight.T

    def embed(self, tokens: Tensor) -> Tensor:
        """With positions and the embedding's norm."""
        decoder, options = self.decoder, self.options
        width = options.decoder_embed_dim
        x = decoder.embed_tokens.weight[tokens] * (1 if options.no_scale_embedding else math.sqrt(width))
        if options.decoder_learned_pos:
            x = x + decoder.embed_positions.weight[: tokens.size(1)]
        elif not options.no_token_positional_embeddings:
            x = x + sinusoidal(tokens.size(1), width)
        return self.norm(x, decoder.layernorm_embedding) if options.layernorm_embedding else x

    def block(self, x: Tensor, norm: nn.Module, part: Any) -> Tensor:
        """Pre-norm, or DeepNorm's post-norm."""
        if self.options.deepnorm:
            return self.norm(self.alpha * x + part(x), norm)
        return x + part(self.norm(x, norm))

    def attend(self, module: nn.Module, x: Tensor) -> Tensor:
        """Causal attention, head by head."""
        options, length = self.options, x.size(1)
        width = options.decoder_embed_dim // options.decoder_attention_heads
        q, k, v = (self.affine(x, projection) for projection in (module.q_proj, module.k_proj, module.v_proj))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads = []
        for head in range(options.decoder_attention_heads):
            part = slice(head * width, (head + 1) * width)
            queries, keys = q[..., part], k[..., part]
            if options.rotary_embed:
                queries, keys = rotated(queries), rotated(keys)
            scores = (queries @ keys.transpose(1, 2) / math.sqrt(width)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        attended = torch.cat(heads, dim=-1)
        if self.has_subln:
            attended = self.norm(attended, module.inner_attn_ln)
        return self.affine(attended, module.out_proj)

    def dense(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The dense feed-forward network."""
        ffn, kind = layer.ffn, str(self.options.activation_fn)
        hidden = ACTIVATIONS[kind](self.affine(x, ffn.fc1))
        if kind == "silu":
            hidden = hidden * self.affine(x, ffn.gate)
        if self.has_subln:
            hidden = self.norm(hidden, ffn.ffn_layernorm)
        return self.affine(hidden, ffn.fc2)

    def route(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The MoE layer, by its own slow reference."""
        hidden, *losses = moe_oracle.forward(layer.moe_layer, x.flatten(0, 1))
        self.losses.append(torch.stack(losses))
        return hidden.view_as(x)

    def affine(self, x: Tensor, linear: nn.Module) -> Tensor:
        """A linear map, with a bias unless the options say no."""
        return x @ linear.weight.T + (0 if self.options.no_bias else linear.bias)

    def norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        """LayerNorm or RMSNorm."""
        if self.options.rms_norm:
            return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight + norm.bias


def sinusoidal(length: int, width: int) -> Tensor:
    """fairseq's, whose first position is 2."""
    half = width // 2
    table = torch.zeros(length, width, dtype=torch.double)
    for place in range(length):
        for index in range(half):
            angle = (place + 2) * 10000 ** (-index / (half - 1))
            table[place, index], table[place, half + index] = math.sin(angle), math.cos(angle)
    return table


def rotated(x: Tensor) -> Tensor:
    """Pairs of neighbouring features ``(B, S, d)`` turned by their position, as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    frequency = 10000 ** (-torch.arange(0, x.size(-1), 2, dtype=torch.double) / x.size(-1))
    angle = torch.arange(x.size(1), dtype=torch.double)[:, None] * frequency
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

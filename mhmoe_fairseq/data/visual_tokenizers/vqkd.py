"""BEiT v2's tokenizer (VQ-KD), for inference, from its own checkpoint files.

A vision transformer's patch features are projected to a few dimensions and brought to length one; the id is that of the
nearest code. Layout and order of steps are those of github.com/microsoft/unilm, ``beit2/modeling_vqkd.py`` and
``beit2/modeling_finetune.py``; the code here is our own. Two things differ on purpose: nothing is counted while ids are
computed (theirs updates a running usage of the codes, across ranks), and pixels are scaled from [0, 1] to [-1, 1]
whatever the batch holds (theirs looks at the largest value).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Provenance, VisualTokenizer, nearest

_HEAD_WIDTH = 64  # of all released models; a checkpoint does not say it
_NORM_EPS = 1e-6
_ENCODER, _PROJECTION, _CODES = "encoder.", "encode_task_layer.", "quantize.embedding.weight"


class _Attention(nn.Module):
    """Self-attention whose queries and values have a bias, keys none."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        parts = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Attention and feed-forward network, each after a layer norm; scaled where the checkpoint scales them."""

    def __init__(self, width: int, inner_width: int, num_heads: int, is_scaled: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, _NORM_EPS)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, _NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner_width), "fc2": nn.Linear(inner_width, width)})
        self.gamma_1 = nn.Parameter(torch.ones(width)) if is_scaled else 1
        self.gamma_2 = nn.Parameter(torch.ones(width)) if is_scaled else 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Encoder(nn.Module):
    """Images to patch features."""

    def __init__(
        self, width: int, inner_width: int, depth: int, patch_size: int, num_patches: int, final_norm: str, scaled: bool
    ):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.blocks = nn.ModuleList(_Block(width, inner_width, width // _HEAD_WIDTH, scaled) for _ in range(depth))
        self.final_norm = final_norm
        self.add_module(final_norm, nn.LayerNorm(width, _NORM_EPS))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N, D); the class token is left out."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.get_submodule(self.final_norm)(x[:, 1:])


class VQKD(VisualTokenizer):
    """The tokenizer of a BEiT v2 checkpoint.

    Args:
        width, inner_width: of the encoder, a multiple of 64, and of its feed-forward networks.
        depth: the encoder's layers.
        final_norm: name of its last layer norm: ``fc_norm``, or ``norm``.
        scaled: whether the layers' outputs are scaled.
    """

    kind = "vqkd"
    can_decode = False

    def __init__(
        self, *sizes: int, provenance: Provenance = None, width: int, inner_width: int, depth: int, code_width: int,
        final_norm: str = "fc_norm", scaled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            *sizes, provenance=provenance, width=width, inner_width=inner_width, depth=depth, code_width=code_width,
            final_norm=final_norm, scaled=scaled,
        )  # fmt: skip
        if final_norm not in ("fc_norm", "norm"):
            raise ValueError(f"final_norm {final_norm!r}: must be fc_norm or norm")
        patches = math.prod(self.token_shape)
        self.encoder = _Encoder(width, inner_width, depth, self.patch_size, patches, final_norm, scaled)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_width))
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(self.vocab_size, code_width)})
        self.requires_grad_(False)

    def _encode(self, images: Tensor) -> Tensor:
        features = self.encode_task_layer(self.encoder(images * 255 / 127.5 - 1))
        return nearest(F.normalize(features, dim=-1), self.get_parameter("quantize.embedding.weight"))


def _weights(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    weights = content.get("model", content.get("state_dict"))
    return weights if isinstance(weights, Mapping) else {}


def is_vqkd_checkpoint(content: Mapping[str, Any]) -> bool:
    """Return whether a file's content has the layout of BEiT v2's checkpoints."""
    return _CODES in _weights(content)


def as_saved(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's content as :meth:`VisualTokenizer.save` lays it out, without decoder and teacher.

    Raises:
        KeyError, RuntimeError: a tensor is missing, or of a layout that BEiT v2 did not release.
    """
    wanted = (_ENCODER, _PROJECTION, _CODES)
    weights = {name: value.float() for name, value in _weights(content).items() if name.startswith(wanted)}
    vocab_size, code_width = weights[_CODES].shape
    width, _, patch_size, _ = weights["encoder.patch_embed.proj.weight"].shape
    if width % _HEAD_WIDTH:
        raise RuntimeError(f"a width of {width} is no multiple of {_HEAD_WIDTH}, the width of an attention head")
    return {
        "vocab_size": vocab_size,
        "patch_size": patch_size,
        "image_size": math.isqrt(weights["encoder.pos_embed"].shape[1] - 1) * patch_size,
        "settings": {
            "width": width,
            "inner_width": len(weights["encoder.blocks.0.mlp.fc1.weight"]),
            "depth": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.blocks.")),
            "code_width": code_width,
            "final_norm": "fc_norm" if "encoder.fc_norm.weight" in weights else "norm",
            "scaled": "encoder.blocks.0.gamma_1" in weights,
        },
        "state": weights,
        "provenance": {"read_from": "a VQ-KD checkpoint of BEiT v2"},
    }

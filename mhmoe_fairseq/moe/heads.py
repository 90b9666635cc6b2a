"""Splitting tokens into sub-tokens and merging them again (P1 section 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MHMoEConfig


def split_heads(x_TD: Tensor, num_heads: int) -> Tensor:
    """``(T, D) -> (N, d)``: the H sub-tokens of one token are consecutive rows."""
    return x_TD.reshape(-1, x_TD.size(-1) // num_heads)


def merge_heads(x_Nd: Tensor, num_heads: int) -> Tensor:
    """``(N, d) -> (T, D)``: the inverse of :func:`split_heads`."""
    return x_Nd.reshape(-1, x_Nd.size(-1) * num_heads)


class ProjectionLayer(nn.Linear):
    """One square map of a projection; ``nn.Linear``'s initial values until ``scale`` says otherwise."""

    gain: float | None = None
    zero_bias = False

    def scale(self, gain: float, zero_bias: bool) -> None:
        """Draw Xavier-uniform values with ``gain``, now and at each ``reset_parameters``."""
        self.gain, self.zero_bias = gain, zero_bias
        self._draw(gain)

    def reset_parameters(self) -> None:
        """The initial values."""
        super().reset_parameters()
        if self.gain is not None:
            self._draw(self.gain)

    def _draw(self, gain: float) -> None:
        nn.init.xavier_uniform_(self.weight, gain=gain)
        if self.bias is not None and self.zero_bias:
            nn.init.zeros_(self.bias)


class Projection(nn.ModuleList):
    """``num_layers`` square linear maps with ReLU between them (P1 table 7).

    Xavier-uniform with ``gain`` (P1 appendix E: 1/sqrt(2) before the split, 1 after the merge);
    ``zero_bias`` zeroes the bias, as the merge projection has it.
    """

    def __init__(self, dim: int, num_layers: int, *, bias: bool, gain: float, zero_bias: bool) -> None:
        layers = [ProjectionLayer(dim, dim, bias=bias) for _ in range(num_layers)]
        super().__init__(layers)
        for layer in layers:  # after all were made, the order of random numbers that a seed stands for
            layer.scale(gain, zero_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D) -> (..., D)``."""
        for index, linear in enumerate(self):
            x = linear(F.relu(x) if index else x)
        return x


def head_projection(config: MHMoEConfig) -> Projection:
    """The projection before the split."""
    return Projection(
        config.embed_dim,
        config.num_projection_layers,
        bias=config.projection_bias,
        gain=1 / math.sqrt(2),
        zero_bias=False,
    )


def merge_projection(config: MHMoEConfig) -> Projection:
    """The projection after the merge."""
    return Projection(
        config.embed_dim, config.num_projection_layers, bias=config.projection_bias, gain=1.0, zero_bias=True
    )


def repeat_mask(padding_mask_T: Tensor, num_heads: int) -> Tensor:
    """A token mask ``(T,)`` for its sub-tokens ``(N,)``."""
    return torch.repeat_interleave(padding_mask_T, num_heads, output_size=padding_mask_T.size(0) * num_heads)

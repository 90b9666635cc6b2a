"""Splitting tokens into sub-tokens and merging them again (P1 section 3)."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x_TD: Tensor, num_heads: int) -> Tensor:
    """Sub-tokens ``(N, d)`` of tokens ``(T, D)``: the H sub-tokens of one token are consecutive rows.

    >>> split_heads(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), 2).tolist()
    [[1, 2], [3, 4], [5, 6], [7, 8]]
    """
    return x_TD.reshape(-1, x_TD.size(-1) // num_heads)


def merge_heads(x_Nd: Tensor, num_heads: int) -> Tensor:
    """Tokens ``(T, D)`` of sub-tokens ``(N, d)``: the inverse of :func:`split_heads`.

    >>> merge_heads(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), 2).tolist()
    [[1, 2, 3, 4], [5, 6, 7, 8]]
    """
    return x_Nd.reshape(-1, x_Nd.size(-1) * num_heads)


def repeat_mask(padding_mask_T: Tensor, num_heads: int) -> Tensor:
    """The mask ``(N,)`` of sub-tokens whose tokens have the mask ``(T,)``.

    >>> repeat_mask(torch.tensor([False, True]), 2).tolist()
    [False, False, True, True]
    """
    return torch.repeat_interleave(padding_mask_T, num_heads, output_size=padding_mask_T.size(0) * num_heads)


class _ProjectionLayer(nn.Linear):
    """One map of a projection; ``nn.Linear``'s initial values until it has a ``gain``."""

    gain: float | None = None
    zero_bias = False

    def reset_parameters(self) -> None:
        """The initial values."""
        super().reset_parameters()
        self.draw()

    def draw(self) -> None:
        """Draw Xavier-uniform weights, if there is a gain."""
        if self.gain is not None:
            nn.init.xavier_uniform_(self.weight, gain=self.gain)
            if self.bias is not None and self.zero_bias:
                nn.init.zeros_(self.bias)


class MergeNorm(nn.RMSNorm):
    """RMSNorm of merged tokens, in float32 or wider, in front of the merge projection (Stable LatentMoE, Kimi K3).

    >>> MergeNorm(2)(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    tensor([[0.8477, 1.1328]], dtype=torch.bfloat16, grad_fn=<ToCopyBackward0>)
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x_TL: Tensor) -> Tensor:
        """``(T, L) -> (T, L)``, in the type of its input."""
        wide = torch.promote_types(x_TL.dtype, torch.float32)
        return F.rms_norm(x_TL.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x_TL.dtype)


class Projection(nn.ModuleList):
    """Linear maps with ReLU between them (P1 table 7).

    Args:
        widths: of the features in front of the first map, behind it, ..., and behind the last.
        gain: of the Xavier-uniform initial weights (P1 appendix E: 1/sqrt(2) before the split, 1 after the merge).
        zero_bias: whether biases begin at zero, as the merge projection's do.

    >>> Projection([8, 4], bias=True, gain=1.0, zero_bias=True)[0].bias
    Parameter containing:
    tensor([0., 0., 0., 0.], requires_grad=True)
    """

    def __init__(self, widths: Sequence[int], *, bias: bool, gain: float, zero_bias: bool) -> None:
        layers = [_ProjectionLayer(*sizes, bias=bias) for sizes in itertools.pairwise(widths)]
        super().__init__(layers)
        for layer in layers:  # after all were made, the order of random numbers that a seed stands for
            layer.gain, layer.zero_bias = gain, zero_bias
            layer.draw()

    def forward(self, x: Tensor) -> Tensor:
        """From the first width to the last."""
        for index, linear in enumerate(self):
            x = linear(F.relu(x) if index else x)
        return x

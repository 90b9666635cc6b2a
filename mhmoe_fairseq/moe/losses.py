"""Auxiliary losses as pure functions of sums over sub-tokens. Padding enters neither numerator nor denominator.

The sums of several batches, or of several processes' parts of a batch, add up: the losses of the total are those of
the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RouterSums(NamedTuple):
    """What the losses depend on.

    Attributes:
        chosen_E: how often each expert was chosen, all choices of one sub-token together counting 1.
        probs_E: the router's full softmax, summed over real sub-tokens.
        z: squared log-partition, summed.
        num_real: real sub-tokens.
    """

    chosen_E: Tensor
    probs_E: Tensor
    z: Tensor
    num_real: Tensor


def router_sums(
    *,
    logits_NE: Tensor,
    probs_NE: Tensor,
    experts_NK: Tensor,
    padding_mask_N: Tensor | None,
    assignment: str = "top1",
) -> RouterSums:
    """Sum over the real sub-tokens of a batch.

    Args:
        logits_NE: the router's output, in the dtype of ``probs_NE``.
        probs_NE: its full softmax.
        experts_NK: chosen experts, first choice first.
        padding_mask_N: True where padded.
        assignment: count first choices (``"top1"``, GShard) or all choices divided by K (``"topk"``).
    """
    counted_NK = experts_NK[:, :1] if assignment == "top1" else experts_NK
    chosen_NE = torch.zeros_like(probs_NE).scatter_(1, counted_NK, 1.0) / counted_NK.size(1)
    z_N = torch.logsumexp(logits_NE, dim=1).square()
    if padding_mask_N is None:
        return RouterSums(chosen_NE.sum(0), probs_NE.sum(0), z_N.sum(), z_N.new_full((), z_N.size(0)))
    mask_N1 = padding_mask_N.unsqueeze(1)
    return RouterSums(
        chosen_NE.masked_fill(mask_N1, 0).sum(0),
        probs_NE.masked_fill(mask_N1, 0).sum(0),
        z_N.masked_fill(padding_mask_N, 0).sum(),
        (~padding_mask_N).sum().to(z_N.dtype),
    )


def load_balancing_loss(sums: RouterSums) -> Tensor:
    """``E * sum_p f_p P_p`` (P1 equation 10, GShard): 1 when both are uniform, 0 without sub-tokens."""
    num_real = sums.num_real.clamp(min=1)
    return sums.chosen_E.numel() * (sums.chosen_E / num_real * (sums.probs_E / num_real)).sum()


def router_z_loss(sums: RouterSums) -> Tensor:
    """Mean squared log-partition of the router's logits (ST-MoE)."""
    return sums.z / sums.num_real.clamp(min=1)


def pack(sums: RouterSums) -> Tensor:
    """One vector ``(2 E + 2,)``, so that the sums travel in one message."""
    return torch.cat([sums.chosen_E, sums.probs_E, sums.z.view(1), sums.num_real.view(1)])


def unpack(vector: Tensor) -> RouterSums:
    """The inverse of ``pack``."""
    num_experts = vector.numel() // 2 - 1
    chosen_E, probs_E, z, num_real = vector.split([num_experts, num_experts, 1, 1])
    return RouterSums(chosen_E, probs_E, z.squeeze(0), num_real.squeeze(0))

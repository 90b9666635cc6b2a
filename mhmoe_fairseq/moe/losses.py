"""Auxiliary losses as pure functions. Padding enters neither numerator nor denominator."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values_N: Tensor, padding_mask_N: Tensor | None) -> Tensor:
    """Mean over dim 0 of ``(N, ...)`` leaving out padded rows; 0 when there is no real row."""
    if padding_mask_N is None:
        return values_N.sum(0) / max(values_N.size(0), 1)
    mask = padding_mask_N.view(-1, *([1] * (values_N.dim() - 1)))
    real = (~padding_mask_N).sum().clamp(min=1)
    return values_N.masked_fill(mask, 0).sum(0) / real


def load_balancing_loss(
    *, probs_NE: Tensor, experts_NK: Tensor, padding_mask_N: Tensor | None, assignment: str = "top1"
) -> Tensor:
    """``E * sum_p f_p P_p`` (P1 equation 10, GShard): 1 when both are uniform.

    Args:
        probs_NE: the router's full softmax.
        experts_NK: chosen experts, first choice first.
        padding_mask_N: True where padded.
        assignment: f_p counts first choices (``"top1"``) or all choices divided by K (``"topk"``).
    """
    num_experts = probs_NE.size(1)
    counted_NK = experts_NK[:, :1] if assignment == "top1" else experts_NK
    chosen_NE = torch.zeros_like(probs_NE).scatter_(1, counted_NK, 1.0) / counted_NK.size(1)
    fraction_E = masked_mean(chosen_NE, padding_mask_N)
    mean_prob_E = masked_mean(probs_NE, padding_mask_N)
    return num_experts * (fraction_E * mean_prob_E).sum()


def router_z_loss(*, logits_NE: Tensor, padding_mask_N: Tensor | None) -> Tensor:
    """Mean squared log-partition of the router's logits (ST-MoE)."""
    return masked_mean(torch.logsumexp(logits_NE, dim=1).square(), padding_mask_N)

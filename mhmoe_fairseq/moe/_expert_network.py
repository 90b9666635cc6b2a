"""What an expert computes, in operations that autograd, torch.func and the compilers know."""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The stacked parameters, in one dtype; None where the configuration has none."""

    fc1_weight: Tensor  # (E, F, d); under expert parallelism E counts this process's experts
    fc1_bias: Tensor | None  # (E, F)
    gate_weight: Tensor | None  # (E, F, d), SwiGLU only
    gate_bias: Tensor | None  # (E, F)
    layernorm_weight: Tensor | None  # (E, F)
    layernorm_bias: Tensor | None  # (E, F)
    fc2_weight: Tensor  # (E, d, F)
    fc2_bias: Tensor | None  # (E, d)


def expert_network(
    x: Tensor,
    weights: ExpertWeights,
    activation: str,
    drop: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    per_row: Callable[[Tensor], Tensor],
) -> Tensor:
    """The experts' outputs of the rows of ``x``, ``(..., d) -> (..., d)``.

    Args:
        drop: dropout on the inner activation.
        linear: ``x W' + b`` with each row's own expert, from stacked weights and biases.
        per_row: a stacked vector ``(E, F)`` as every row's expert has it, broadcastable to the activation.
    """
    inner = linear(x, weights.fc1_weight, weights.fc1_bias)
    if weights.gate_weight is not None:
        inner = F.silu(inner) * linear(x, weights.gate_weight, weights.gate_bias)
    else:
        inner = F.gelu(inner) if activation == "gelu" else F.relu(inner)
    inner = drop(inner)
    if weights.layernorm_weight is not None and weights.layernorm_bias is not None:
        scale, shift = per_row(weights.layernorm_weight), per_row(weights.layernorm_bias)
        inner = F.layer_norm(inner, inner.shape[-1:]) * scale + shift
    return linear(inner, weights.fc2_weight, weights.fc2_bias)

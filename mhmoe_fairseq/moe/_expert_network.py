"""What an expert computes, in operations that autograd, torch.func and the compilers know; and on an accelerator.

No value is read back to the host.
"""

import functools
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .dispatch import DispatchPlan
from .modes import in_forward_mode
from .quantize import quantize_activation

_ALIGNMENT_BYTES = 16  # grouped_mm: every row stride
_GROUPS = range(1, 1024)  # that its kernel takes


class ExpertWeights(NamedTuple):
    """The stacked parameters, in one dtype; None where the configuration has none."""

    fc1_weight: Tensor  # (E, F, d); under expert parallelism E counts this process's experts
    fc1_bias: Tensor | None  # (E, F)
    gate_weight: Tensor | None  # (E, F, d), of a gated activation
    gate_bias: Tensor | None  # (E, F)
    layernorm_weight: Tensor | None  # (E, F)
    layernorm_bias: Tensor | None  # (E, F)
    fc2_weight: Tensor  # (E, d, F)
    fc2_bias: Tensor | None  # (E, d)

    def each(self, change: Callable[[Tensor], Tensor]) -> "ExpertWeights":
        """What ``change`` makes of every parameter."""
        return ExpertWeights._make(None if weight is None else change(weight) for weight in self)


def expert_network(
    x: Tensor,
    weights: ExpertWeights,
    activation: str,
    drop: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    per_row: Callable[[Tensor], Tensor],
    quantized: bool = False,
) -> Tensor:
    """The experts' outputs of the rows of ``x``, ``(..., d) -> (..., d)``.

    Args:
        drop: dropout on the inner activation.
        linear: ``x W' + b`` with each row's own expert, from stacked weights and biases.
        per_row: a stacked vector ``(E, F)`` as every row's expert has it, broadcastable to the activation.
        quantized: round the second map's input to eight bits, as that of the first and the weights have been.
    """
    of_maps = [linear(x, weights.fc1_weight, weights.fc1_bias)]
    if weights.gate_weight is not None:
        of_maps.append(linear(x, weights.gate_weight, weights.gate_bias))
    inner = drop(ACTIVATIONS[activation].of(*of_maps))
    if weights.layernorm_weight is not None and weights.layernorm_bias is not None:
        scale, shift = per_row(weights.layernorm_weight), per_row(weights.layernorm_bias)
        inner = F.layer_norm(inner, inner.shape[-1:]) * scale + shift
    if quantized:
        inner = quantize_activation(inner)
    return linear(inner, weights.fc2_weight, weights.fc2_bias)


def grouped_mm_supports(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...], num_experts: int) -> bool:
    """Whether grouped_mm's accelerator kernel takes this: bfloat16, aligned rows, Hopper or Blackwell (9.x and 10.x).

    Elsewhere on CUDA it reads the offsets on the host and calls a product for each expert.
    """
    if in_forward_mode() or num_experts not in _GROUPS:  # it has no tangents
        return False
    if dtype != torch.bfloat16 or any(width * dtype.itemsize % _ALIGNMENT_BYTES for width in widths):
        return False
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)[0] in (9, 10)
    return True


def grouped_ffn(
    x_Rd: Tensor, plan: DispatchPlan, weights: ExpertWeights, activation: str, dropout: float, quantized: bool
) -> Tensor:
    """Expert outputs of sorted rows through grouped_mm, ``(R, d) -> (R, d)``; 0 in rows of the virtual expert."""
    real_R1 = torch.arange(x_Rd.size(0), device=x_Rd.device).unsqueeze(1) < plan.offsets_E[-1]
    columns = _ALIGNMENT_BYTES // x_Rd.element_size()
    ones_RC = x_Rd.new_ones(x_Rd.size(0), columns)

    def clean(rows: Tensor) -> Tensor:
        # grouped_mm leaves rows behind the last offset unwritten, in its backward too.
        return rows if plan.all_real else torch.where(real_R1, rows, 0)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = clean(F.grouped_mm(x, weight.transpose(1, 2), offs=plan.offsets_E))
        return y if bias is None else y + per_row(bias)

    def per_row(stacked: Tensor) -> Tensor:
        # A product with ones, so that the gradient is one, too, summed up in float32. That of index_select adds an
        # expert's rows on CUDA one after the other, rounds each sum, and in bf16 stands still at 256 equal ones.
        rows = F.pad(stacked.unsqueeze(1), (0, 0, 0, columns - 1))
        # Clean because of its gradient, a product with that of fc2's input.
        return clean(F.grouped_mm(ones_RC, rows, offs=plan.offsets_E))

    return expert_network(clean(x_Rd), weights, activation, _dropout(dropout), linear, per_row, quantized)


def blocked_ffn(
    x_Rd: Tensor, plan: DispatchPlan, weights: ExpertWeights, activation: str, dropout: float, quantized: bool
) -> Tensor:
    """Expert outputs of sorted rows through batched products over equal blocks, ``(R, d) -> (R, d)``.

    Every expert's rows are padded to whole blocks of ceil(R / E) rows; at most 2E blocks are needed whatever the
    router did, so all shapes are known without looking.
    """
    num_experts, rows = weights.fc1_weight.size(0), x_Rd.size(0)
    block = max(-(-rows // num_experts), 1)
    num_blocks = num_experts + rows // block
    blocks_E = torch.div(plan.load() + block - 1, block, rounding_mode="floor")
    ends_E = blocks_E.cumsum(0)
    numbers = torch.arange(num_blocks, device=x_Rd.device)
    index_B = torch.searchsorted(ends_E, numbers, right=True).clamp(max=num_experts - 1)

    expert_R = plan.expert_of_row()
    shift_E = (ends_E - blocks_E) * block - (plan.offsets_E - plan.load())
    slot_R = torch.arange(rows, device=x_Rd.device) + shift_E.index_select(0, expert_R.clamp(max=num_experts - 1))
    spare = num_blocks * block  # the one slot behind the blocks takes all rows of the virtual expert
    slot_R = torch.where(expert_R < num_experts, slot_R, spare)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.bmm(x, weight.index_select(0, index_B).transpose(1, 2))
        return y if bias is None else y + per_row(bias)

    def per_row(stacked: Tensor) -> Tensor:
        return stacked.index_select(0, index_B).unsqueeze(1)

    x_Sd = x_Rd.new_zeros(spare + 1, x_Rd.size(1)).index_copy(0, slot_R, x_Rd)
    x_Bbd = x_Sd[:-1].view(num_blocks, block, -1)
    y_Bbd = expert_network(x_Bbd, weights, activation, _dropout(dropout), linear, per_row, quantized)
    return F.pad(y_Bbd.reshape(spare, -1), (0, 0, 0, 1)).index_select(0, slot_R)


def _dropout(probability: float) -> Callable[[Tensor], Tensor]:
    return functools.partial(F.dropout, p=probability, training=probability > 0)

"""LayerNorm between an expert's activation and its second linear map, in few passes and with a hand-written backward.

For a row ``a`` of F activations with mean ``m`` and reciprocal deviation ``s``, the norm's ``w`` and ``b``, and the
map's ``V`` (d, F) and ``c``::

    y = (s (a - m) * w + b) V' + c = s ((a - m) * w) V' + (V b + c)

The scale ``s`` is applied after the product, where a row has d numbers and not F. The two means over a row that a
LayerNorm's backward needs are products of d numbers too, since ``g = dL/dy`` and ``y`` are known; and all gradients
of parameters follow from the product ``D = (s g)' (a - m)``. What costs is a pass over F numbers: MH-MoE has
several times the inner activations of a one-head layer of equal FLOPs. Those passes are in :mod:`.inner`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import memory as _cpu_memory

EPS = 1e-5  # F.layer_norm's


class NormedLinear(NamedTuple):
    """What one expert's LayerNorm does to the linear map behind it."""

    along_d: Tensor  # V w
    offset_d: Tensor  # V b + c

    @classmethod
    def of(cls, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None) -> "NormedLinear":
        """From ``w``, ``b``, ``V`` and ``c``, which may be of different dtypes."""
        norm_weight, norm_bias = norm_weight.to(weight.dtype), norm_bias.to(weight.dtype)
        offset_d = torch.mv(weight, norm_bias)
        return cls(torch.mv(weight, norm_weight), offset_d if bias is None else offset_d + bias)

    def finish(self, y_Pd: Tensor, rstd_P: Tensor) -> None:
        """Turns ``((a - m) * w) V'`` into the output."""
        y_Pd.mul_(rstd_P.unsqueeze(1)).add_(self.offset_d)

    def input_grad(self, y_grad_Pd: Tensor, rstd_P: Tensor, dot_P: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """``along`` and ``shift``, ``(P,)``, of the input's gradient ``(s g) V * w - along (a - m) - shift``.

        Args:
            y_grad_Pd: the output's gradient times ``s``.
            dot_P: the output times its gradient, summed over d.
            size: F.
        """
        sums_2d = torch.stack([self.along_d, self.offset_d]).to(rstd_P.dtype)
        shift_P, of_offset_P = torch.mm(y_grad_Pd.to(rstd_P.dtype), sums_2d.t()).t()
        return (dot_P * rstd_P - of_offset_P) * rstd_P / size, shift_P / size


def parameter_grads(
    product_dF: Tensor, sum_d: Tensor, weights: tuple[Tensor, Tensor, Tensor], norm_F: Tensor, norm_bias_F: Tensor
) -> None:
    """Writes the gradients of ``w`` and ``b``, and turns ``product_dF`` into that of ``V``.

    Args:
        product_dF: ``D`` above, over all rows.
        sum_d: the sum of the output's gradients, which is the gradient of ``c``.
        weights: ``w``, ``b`` and ``V``.
        norm_F, norm_bias_F: overwritten.
    """
    norm_weight, norm_bias, weight = weights
    scratch_dF = _cpu_memory.empty(tuple(product_dF.shape), product_dF)
    torch.sum(torch.mul(product_dF, weight, out=scratch_dF), dim=0, out=norm_F)
    torch.mv(weight.t(), sum_d, out=norm_bias_F)
    product_dF.mul_(norm_weight).addr_(sum_d, norm_bias)

"""LayerNorm between an expert's activation and its second linear map, in place and with a hand-written backward.

For a row ``a`` of F activations with mean ``m`` and reciprocal deviation ``s``, the norm's ``w`` and ``b``, and the
map's ``V`` (d, F) and ``c``::

    y = (s (a - m) * w + b) V' + c = s ((a - m) * w) V' + (V b + c)

The scale ``s`` is applied after the product, where a row has d numbers and not F. The two means over a row that a
LayerNorm's backward needs are products of d numbers too, since ``g = dL/dy`` and ``y`` are known; and all gradients
of parameters follow from the product ``D = (s g)' (a - m)``. What costs is a pass over F numbers: MH-MoE has
several times the inner activations of a one-head layer of equal FLOPs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import memory as _cpu_memory

_EPS = 1e-5  # F.layer_norm's


class NormedLinear(NamedTuple):
    """One expert's LayerNorm and the linear map behind it."""

    norm_weight: Tensor  # (F,)
    norm_bias: Tensor  # (F,)
    weight: Tensor  # (d, F)
    bias: Tensor | None  # (d,)

    def forward(self, inner_PF: Tensor, mean_P: Tensor, rstd_P: Tensor, out_Pd: Tensor) -> None:
        """Writes the output and the statistics; ``inner_PF`` is used up."""
        torch.sum(inner_PF, dim=1, dtype=mean_P.dtype, out=mean_P).div_(inner_PF.size(1))
        # The variance of centred rows: a mean far larger than the deviation cancels nothing.
        inner_PF.sub_(mean_P.unsqueeze(1))
        torch.linalg.vector_norm(inner_PF, dim=1, dtype=rstd_P.dtype, out=rstd_P)
        rstd_P.square_().div_(inner_PF.size(1)).add_(_EPS).rsqrt_()
        torch.mm(inner_PF.mul_(self.norm_weight), self.weight.t(), out=out_Pd)
        out_Pd.mul_(rstd_P.unsqueeze(1)).add_(self._offset())

    def backward(self, centered_PF: Tensor, rstd_P: Tensor, y_grad_Pd: Tensor, dot_P: Tensor, grad_PF: Tensor) -> None:
        """Writes the gradient of the norm's input to ``grad_PF``.

        Args:
            centered_PF: the norm's input less its mean.
            rstd_P: from the forward.
            y_grad_Pd: the output's gradient times ``rstd_P``.
            dot_P: the output times its gradient, summed over d.
            grad_PF: overwritten.
        """
        size = centered_PF.size(1)
        mean_P = torch.mv(y_grad_Pd, torch.mv(self.weight, self.norm_weight)) / size
        along_P = (dot_P * rstd_P - torch.mv(y_grad_Pd, self._offset())) * rstd_P / size
        torch.mm(y_grad_Pd, self.weight, out=grad_PF).mul_(self.norm_weight)
        # Two passes: one addcmul with two columns that broadcast would leave the vectorised path.
        grad_PF.addcmul_(centered_PF, along_P.to(grad_PF.dtype).unsqueeze(1), value=-1)
        grad_PF.sub_(mean_P.unsqueeze(1))

    def parameter_grads(self, product_dF: Tensor, sum_d: Tensor, norm_F: Tensor, norm_bias_F: Tensor) -> None:
        """Writes the gradients of ``norm_weight`` and ``norm_bias``, and turns ``product_dF`` into that of ``weight``.

        Args:
            product_dF: ``D`` above, over all rows.
            sum_d: the sum of the output's gradients, which is the gradient of ``bias``.
            norm_F, norm_bias_F: overwritten.
        """
        scratch_dF = _cpu_memory.empty(tuple(product_dF.shape), product_dF)
        torch.sum(torch.mul(product_dF, self.weight, out=scratch_dF), dim=0, out=norm_F)
        torch.mv(self.weight.t(), sum_d, out=norm_bias_F)
        product_dF.mul_(self.norm_weight).addr_(sum_d, self.norm_bias)

    def _offset(self) -> Tensor:
        if self.bias is None:
            return torch.mv(self.weight, self.norm_bias)
        return torch.addmv(self.bias, self.weight, self.norm_bias)

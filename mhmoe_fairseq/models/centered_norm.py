"""Layer normalisation of what tells features apart: without their running mean."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

_LEAST_WEIGHT = 0.02  # of a new batch in the running mean: it is of the last 50 batches or so


class CenteredLayerNorm(nn.LayerNorm):
    """Layer normalisation of features from which their running mean over the training rows is taken away.

    Class tokens of a pre-trained encoder have most of their length in common. LayerNorm keeps that, and a new head's
    gradients are of it more than of what tells the rows apart. Without it they are not: mean-only batch normalisation
    (Salimans and Kingma, 2016, section 3), and the centring half of the BatchNorm before MAE's linear probe (He et al.,
    2022, appendix A.1), but by the running mean in training, too. Ranks share the mean.

    Args:
        width: of the features.

    Attributes:
        running_mean: ``(width,)``: of all rows so far, later of the last 50 batches or so.
        num_batches: how many batches it has seen.
        tells_padding: True, see ``moe.uncounted.taken_for_padding``.
    """

    tells_padding = True
    running_mean: Tensor
    num_batches: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """``(rows, width) -> (rows, width)``; in training the mean follows the rows first.

        Args:
            padding_mask: bool ``(rows,)``, True for rows that the mean does not follow.
        """
        if self.training:
            self._follow(x.detach() if padding_mask is None else x.detach()[~padding_mask])
        return super().forward(x - self.running_mean)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        totals = torch.cat([x.float().sum(0), x.new_full((1,), x.size(0), dtype=torch.float)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        self.num_batches += 1
        weight = (1 / self.num_batches).clamp(min=_LEAST_WEIGHT)
        mean = (totals[:-1] / totals[-1]).to(self.running_mean.dtype)
        self.running_mean.lerp_(mean, weight.to(mean.dtype))

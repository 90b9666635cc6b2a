"""A pool of experts for each modality (``--mhmoe-modality-experts separate``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe import MHMoEConfig, MHMoELayer, MHMoEOutput, RoutingStats
from ..moe.parallelism import ExpertParallelism, Traffic


class SeparateExperts(nn.Module):
    """Two MH-MoE layers: ``A`` routes the image's positions, ``B`` the text's.

    Both are always called, with no positions too: experts on other processes wait for every process's rows, whatever
    its batch holds.
    """

    def __init__(self, config: MHMoEConfig, parallel: ExpertParallelism | None = None) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        self.A = MHMoELayer(config, parallel=parallel)
        self.B = MHMoELayer(config, parallel=parallel)

    def forward(self, x: Tensor, padding_mask: Tensor | None, split: int) -> MHMoEOutput:
        """Apply the pools.

        Args:
            x: ``(B, L, D)``, of which the first ``split`` positions are the image's.
            padding_mask: bool ``(B, L)``, True where padded.

        Returns:
            hidden ``(B, L, D)``; losses weighted by the pools' sub-tokens; statistics of the images' pool and of
            the text's, ``(2, E)`` and ``(2,)``.
        """
        image = self.A(x[:, :split], None if padding_mask is None else padding_mask[:, :split])
        text = self.B(x[:, split:], None if padding_mask is None else padding_mask[:, split:])
        counts = torch.stack([image.stats.num_subtokens, text.stats.num_subtokens])
        if self.parallel is not None and self.config.balance_scope == "global":
            counts = self.parallel.sum(counts)
        of_image, of_text = counts / counts.sum().clamp(min=1)
        return MHMoEOutput(
            torch.cat([image.hidden, text.hidden], dim=1),
            of_image * image.balance_loss + of_text * text.balance_loss,
            of_image * image.z_loss + of_text * text.z_loss,
            RoutingStats(*(torch.stack(counts) for counts in zip(image.stats, text.stats))),
        )

    @property
    def traffic(self) -> Traffic | None:
        """What both pools' latest forward pass sent to experts on other processes; None while all experts are here."""
        if self.A.traffic is None or self.B.traffic is None:
            return None
        return Traffic(*(image + text for image, text in zip(self.A.traffic, self.B.traffic)))

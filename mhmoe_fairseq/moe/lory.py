"""Lory's causal segment routing (Zhong et al., 2024), in a form that is strictly causal.

G counts segments here, L is their length: ``(B, G L, D)`` are tokens at their places in segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import MHMoEOutput
from .merged import MERGINGS, MergedConfig, MergedLayer, real_tokens


class SegmentMemory:
    """What a layer keeps of earlier steps of B sequences; empty at first.

    Kept are ``tokens_B``, real tokens so far; ``sum_BD``, of those of the segment that is not complete; and
    ``previous_BD``, the mean of the segment before it, zero before a first one.

    >>> memory = SegmentMemory()
    >>> memory.is_empty, memory.read(torch.ones(2, 5, 3))[0]
    (True, tensor([0, 0]))
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was kept yet."""
        return self._kept is None

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``tokens_B``, ``sum_BD`` and ``previous_BD``; zeros for the sequences ``x (B, S, D)`` if empty."""
        if self._kept is not None:
            return self._kept
        zeros_BD = x.new_zeros(x.size(0), x.size(2), dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.zeros(x.size(0), dtype=torch.long, device=x.device), zeros_BD, zeros_BD

    def keep(self, tokens_B: Tensor, sum_BD: Tensor, previous_BD: Tensor) -> None:
        """In place of what was kept."""
        self._kept = tokens_B, sum_BD, previous_BD

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was; there may be more rows than before, or fewer."""
        if self._kept is not None:
            tokens_B, sum_BD, previous_BD = (kept.index_select(0, rows) for kept in self._kept)
            self.keep(tokens_B, sum_BD, previous_BD)


class LoryLayer(MergedLayer):
    """Every segment of a sequence passes the experts merged by the mean of the segment before it.

    A sequence's first segment is merged by a learned bias, uniform at first, where the paper takes the segment's own
    mean without its gradient, which lets its positions see later ones. Segments are counted over real tokens, from a
    sequence's first; so a previous segment is always whole.

    Attributes:
        first_E: the logits of first segments.

    >>> config = MergedConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16, segment_length=2)
    >>> layer, x = LoryLayer(config), torch.randn(1, 5, 8)
    >>> memory, whole = layer.new_memory(), layer(x).hidden
    >>> steps = [layer(token, None, memory).hidden for token in x.split(1, dim=1)]
    >>> torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-6)
    True
    """

    def __init__(self, config: MergedConfig) -> None:
        super().__init__(config)
        self.first_E = nn.Parameter(torch.zeros(config.num_experts))

    @staticmethod
    def num_own_params(config: MergedConfig) -> int:
        """One for each expert."""
        return config.num_experts

    def reset_parameters(self) -> None:
        """Initial values for all parameters."""
        super().reset_parameters()
        nn.init.zeros_(self.first_E)

    def new_memory(self) -> SegmentMemory:
        """For incremental decoding: given to the calls for consecutive pieces of sequences."""
        return SegmentMemory()

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, memory: SegmentMemory | None = None
    ) -> MHMoEOutput:
        """Apply the layer.

        Args:
            x: ``(B, S, D)``.
            padding_mask: bool ``(B, S)``, True where padded, on the left or on the right.
            memory: of the sequences that ``x`` continues; brought up to date.
        """
        memory = SegmentMemory() if memory is None else memory
        (batch, length, dim), segment = x.shape, self.config.segment_length
        x, real_BS = real_tokens(x, padding_mask)
        before_B, sum_BD, previous_BD = memory.read(x)
        start_B = before_B % segment  # of x's first token in the segment that it continues
        end_B = start_B + real_BS.sum(1)
        # As many segments as x may be part of, whatever its padding and, if it continues some, where they begin.
        count = max(-(-(length + (0 if memory.is_empty else segment - 1)) // segment), 1)

        places_BS = (start_B.unsqueeze(1) + real_BS.cumsum(1) - 1).where(real_BS, count * segment)
        places_BSD = places_BS.unsqueeze(2).expand_as(x)
        placed = x.new_zeros(batch, count * segment + 1, dim).scatter(1, places_BSD, x)[:, :-1]
        placed_BGLD = placed.view(batch, count, segment, dim)

        sums_BGD = placed_BGLD.sum(2, dtype=sum_BD.dtype)
        sums_BGD = torch.cat([sums_BGD[:, :1] + sum_BD.unsqueeze(1), sums_BGD[:, 1:]], dim=1)
        before_BGD = torch.cat([previous_BD.unsqueeze(1), sums_BGD / segment], dim=1)  # one more than segments
        index_B1D = (end_B // segment).view(-1, 1, 1).expand(-1, 1, dim)
        unfinished_BD = F.pad(sums_BGD, (0, 0, 0, 1)).gather(1, index_B1D).squeeze(1)
        memory.keep(before_B - start_B + end_B, unfinished_BD, before_BGD.gather(1, index_B1D).squeeze(1))

        starts_G = torch.arange(count, device=x.device) * segment
        is_first_BG = (before_B - start_B).unsqueeze(1) + starts_G == 0
        probs_GE = self._merging(before_BGD[:, :-1].to(x.dtype), is_first_BG)
        if length == 1:  # a step of decoding: no reason to compute a whole segment
            y = self.experts(x, probs_GE)
        else:
            y = self.experts(placed_BGLD.flatten(0, 1), probs_GE).view(batch, count * segment, dim)
            y = F.pad(y, (0, 0, 0, 1)).gather(1, places_BSD)
        filled_B2G = (torch.stack([start_B, end_B], dim=1).unsqueeze(2) - starts_G).clamp(0, segment)
        return self.output(y, probs_GE, filled_B2G.diff(dim=1).flatten())

    def _merging(self, before_BGD: Tensor, is_first_BG: Tensor) -> Tensor:
        """Weights of the experts in each segment's network, from the mean of the one before it."""
        logits_GE = self.route(before_BGD.flatten(0, 1))
        logits_GE = torch.where(is_first_BG.view(-1, 1), self.first_E.to(logits_GE.dtype), logits_GE)
        return torch.softmax(logits_GE, dim=1)


MERGINGS["lory"] = LoryLayer

"""The classification head of a causal language model: it reads each row's last token, which has seen all others."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..common.ranges import check_flag

logger = logging.getLogger(__name__)

_INITIAL_DEVIATION = 0.02


class LastTokenHead(nn.Linear):
    """Class logits from the features of each row's last token.

    Args:
        embed_dim: width of the features.
        num_classes: two or more.
        dropout: on the features.
        name: of the head, for messages.
        may_be_new: in training, a checkpoint without this head, that of a language model, leaves it as it is
            initialised; otherwise a missing head is as much an error as any other missing parameter.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """

    def __init__(self, embed_dim: int, num_classes: int, dropout: float, name: str, may_be_new: bool) -> None:
        check_flag("num_classes", num_classes)
        check_flag("mhmoe_head_dropout", dropout)
        super().__init__(embed_dim, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.name = name
        self.may_be_new = may_be_new

    def reset_parameters(self) -> None:
        """Small random weights and no bias, so that a new head starts close to indifference."""
        nn.init.normal_(self.weight, std=_INITIAL_DEVIATION)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, padding_mask: Tensor) -> Tensor:
        """Logits.

        Args:
            features: ``(B, S, D)``.
            padding_mask: bool ``(B, S)``, True = padded; every row has a token.

        Returns:
            ``(B, classes)``, in the precision of the head's parameters.
        """
        places = torch.arange(features.size(1), device=features.device)
        last = places.masked_fill(padding_mask, 0).amax(dim=1)
        rows = torch.arange(features.size(0), device=features.device)
        return super().forward(self.dropout(features[rows, last].to(self.weight.dtype)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {prefix + name: parameter.detach() for name, parameter in self.named_parameters()}
        if self.may_be_new and not own.keys() & state_dict.keys():
            logger.info(f"the checkpoint has no classification head {self.name!r}: it starts from its initial weights")
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

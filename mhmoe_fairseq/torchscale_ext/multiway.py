"""Modules with one set of weights for images and another for text, as TorchScale's multiway networks.

A sequence is ``[image positions | text positions]``; ``split`` says how many of its positions are the image's. It is an
argument everywhere: TorchScale keeps it in an attribute of every module, which the next call overwrites. So TorchScale
is told to build for one modality, and what it built gives way to these modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Multiway(nn.Module):
    """``A`` for the image's positions, ``B`` for the text's; parameter names are TorchScale's.

    A modality without positions does not call its module, so a batch of images leaves the text's weights without
    gradients.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.A = image
        self.B = text

    def forward(self, x: Tensor, split: int) -> Tensor:
        """``(B, L, ...) -> (B, L, ...)``, of which the first ``split`` positions go through A."""
        if split == x.size(1):
            return self.A(x)
        if split == 0:
            return self.B(x)
        return torch.cat([self.A(x[:, :split]), self.B(x[:, split:])], dim=1)


def build_multiway(build: Callable[[], nn.Module]) -> Multiway:
    """A module for each modality, with initial values of their own."""
    return Multiway(build(), build())

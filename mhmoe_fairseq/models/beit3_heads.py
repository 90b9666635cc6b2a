"""The heads of BEiT-3's fine-tuning tasks (unilm ``beit3/modeling_finetune.py``): each reads the encoder's features.

A head is called with the features of a joint sequence ``[cls | patches | text]``, ``(B, L, D)``, and the model's
``extra``, of which it uses ``image_positions``: how many of the L positions belong to the image.

``normalize_output`` tells whether a head wants the encoder's last norm before it; where not, it has one of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .centered_norm import CenteredLayerNorm

_INITIAL_DEVIATION = 0.02
_SMALL_START = 0.001  # of the heads whose logits start at almost zero
_INITIAL_TEMPERATURE = 0.07


class VQAHead(nn.Module):
    """One logit per answer, from the class token.

    The biases start where one answer of all is expected (the prior of Lin et al., 2017, section 3.3), other than in
    BEiT-3: there the first updates go into unlearning that half of all answers are right.

    Args:
        embed_dim: D.
        num_answers: of the answer vocabulary.
        center: whether the features' running mean is taken away first, other than in BEiT-3.
    """

    normalize_output = False

    def __init__(self, embed_dim: int, num_answers: int, center: bool = False) -> None:
        super().__init__()
        require_classes(num_answers, "answers")
        self.norm = _norm(embed_dim, center)
        self.pooler = _linear(embed_dim, embed_dim)
        self.classifier = _two_layers(embed_dim, 2 * embed_dim, num_answers)
        nn.init.constant_(self.classifier[-1].bias, -math.log(num_answers - 1))

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """``(B, L, D) -> (B, answers)``."""
        pooled = torch.tanh(self.pooler(self.norm(features[:, 0])))
        return self.classifier(pooled)


class NLVR2Head(nn.Module):
    """Class logits of a statement about two images, from both class tokens and both first text tokens.

    Only the last layer starts small, in BEiT-3 the first, too: with hidden units that differ from the start, a short
    training gets beyond guessing sooner.

    Args:
        embed_dim: D.
        num_classes: two: false and true.
        center: as :class:`VQAHead`'s.
    """

    normalize_output = True

    def __init__(self, embed_dim: int, num_classes: int = 2, center: bool = False) -> None:
        super().__init__()
        require_classes(num_classes, "classes")
        self.norm = _norm(4 * embed_dim, center)
        self.classifier = _two_layers(4 * embed_dim, 2 * embed_dim, num_classes)
        _start_small(self.classifier[-1])

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """Logits.

        Args:
            features: ``(2 B, L, D)``: the left images' rows, then the right images', each with the statement.
            extra: with ``image_positions``, where the text starts.

        Returns:
            ``(B, classes)``.
        """
        both = torch.cat([features[:, 0], features[:, extra["image_positions"]]], dim=-1)
        left, right = both.chunk(2, dim=0)
        return self.classifier(self.norm(torch.cat([left, right], dim=-1)))


class ImageClassificationHead(nn.Module):
    """Class logits of an image, from the mean of its patches; the class token is left out.

    Args:
        embed_dim: D.
        num_classes: two or more.
        center: as :class:`VQAHead`'s.
    """

    normalize_output = False

    def __init__(self, embed_dim: int, num_classes: int, center: bool = False) -> None:
        super().__init__()
        require_classes(num_classes, "classes")
        self.norm = _norm(embed_dim, center)
        self.classifier = _linear(embed_dim, num_classes)
        _start_small(self.classifier)

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """``(B, L, D) -> (B, classes)``."""
        patches = features[:, 1 : extra["image_positions"]]
        return self.classifier(self.norm(patches.mean(dim=1)))


class RetrievalHead(nn.Module):
    """A vector of length 1 for an image or for a text, from the first token of a sequence that has only one of them.

    Args:
        embed_dim: D.

    Attributes:
        logit_scale: the logarithm of what similarities are multiplied by in the contrastive loss, learnt.
    """

    normalize_output = True

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.image_projection = _linear(embed_dim, embed_dim, bias=False)
        self.text_projection = _linear(embed_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / _INITIAL_TEMPERATURE)))

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """``(B, L, D) -> (B, D)``."""
        project = self.image_projection if extra["image_positions"] else self.text_projection
        return F.normalize(project(features[:, 0]), dim=-1)


def require_classes(number: int, what: str) -> None:
    """There is something to choose from.

    Raises:
        ValueError: if not.
    """
    if number < 2:
        raise ValueError(f"a classification head needs at least 2 {what}, the data have {number}")


def _norm(width: int, center: bool) -> nn.LayerNorm:
    return CenteredLayerNorm(width) if center else nn.LayerNorm(width)


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=_INITIAL_DEVIATION)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), _linear(hidden, outputs))


def _start_small(module: nn.Module) -> None:
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data.mul_(_SMALL_START)

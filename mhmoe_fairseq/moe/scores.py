"""Scores: what a gate makes of the router's logits, and takes the weights of the experts' outputs from.

A new score is a subclass of :class:`Score` in ``SCORES``.
"""

import torch
from torch import Tensor

from .modes import widened

SCORES: "dict[str, type[Score]]" = {}


class Score:
    """A score of each expert that grows with its logit, in float32 or wider; a subclass has ``of`` and ``num_kept``.

    >>> issubclass(SCORES["sigmoid"], Score)
    True
    """

    @staticmethod
    def of(logits_NE: Tensor) -> Tensor:
        """``(N, E) -> (N, E)``."""
        raise NotImplementedError

    @staticmethod
    def chosen_by(logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        """What a selection bias is added to, and experts are chosen by then; by default the scores."""
        return scores_NE

    @staticmethod
    def normalized(scores: Tensor) -> Tensor:
        """Scores, of all experts or of the chosen ones, that sum to one per row; rows of zeros stay zeros.

        >>> SCORES["softmax"].normalized(torch.tensor([[0.5, 0.3]]))
        tensor([[0.6250, 0.3750]])
        """
        raise NotImplementedError

    @classmethod
    def probabilities(cls, scores_NE: Tensor) -> Tensor:
        """How much of a sub-token each expert is likely to get: what a balance loss and an entropy are of."""
        return cls.normalized(scores_NE)

    @staticmethod
    def num_kept(num_experts: int) -> int:
        """How many numbers of a sub-token are kept for the backward pass, beside its logits and its gate weights."""
        raise NotImplementedError


class Softmax(Score):
    """Probabilities that the experts compete for.

    >>> Softmax.of(torch.tensor([[3.0, 1.0]]))
    tensor([[0.8808, 0.1192]])
    """

    @staticmethod
    def of(logits_NE: Tensor) -> Tensor:
        """The softmax."""
        return torch.softmax(logits_NE, dim=1, dtype=torch.promote_types(logits_NE.dtype, torch.float32))

    @staticmethod
    def normalized(scores: Tensor) -> Tensor:
        """With TorchScale's least sum, which only what capacity left over comes near."""
        return scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).eps)

    @classmethod
    def probabilities(cls, scores_NE: Tensor) -> Tensor:
        """What they are."""
        return scores_NE

    @staticmethod
    def num_kept(num_experts: int) -> int:
        """The softmax."""
        return num_experts


class Logit(Softmax):
    """As :class:`Softmax`, but a selection bias is added to the logits (Multi-Head LatentMoE, arXiv 2602.04870).

    >>> logits = torch.tensor([[2.0, 1.9, 0.0]])
    >>> Logit.chosen_by(logits, Logit.of(logits)) + torch.tensor([0.0, 0.0, 1.5])
    tensor([[2.0000, 1.9000, 1.5000]])
    """

    @staticmethod
    def chosen_by(logits_NE: Tensor, scores_NE: Tensor) -> Tensor:
        """The logits."""
        return widened(logits_NE)


class Sigmoid(Score):
    """A score of its own for each expert, whatever the others' (DeepSeek-V3, Loss-Free Balancing).

    >>> Sigmoid.of(torch.tensor([[0.0, 2.0]])), Sigmoid.normalized(torch.tensor([[1e-9, 3e-9], [0.0, 0.0]]))
    (tensor([[0.5000, 0.8808]]), tensor([[0.2500, 0.7500],
            [0.0000, 0.0000]]))
    """

    @staticmethod
    def of(logits_NE: Tensor) -> Tensor:
        """The logistic function."""
        return widened(logits_NE).sigmoid()

    @staticmethod
    def normalized(scores: Tensor) -> Tensor:
        """All scores of a row may be small at once: the least sum is V3's."""
        return scores / scores.sum(1, keepdim=True).clamp(min=1e-20)

    @staticmethod
    def num_kept(num_experts: int) -> int:
        """The scores, and their sum before and after it is held above zero."""
        return num_experts + 2


SCORES.update(softmax=Softmax, sigmoid=Sigmoid, logit=Logit)

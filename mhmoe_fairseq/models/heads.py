"""Heads of fine-tuning: a language model's, and BEiT-3's for its tasks (unilm ``beit3/modeling_finetune.py``).

BEiT-3 calls a head with the features of a joint sequence ``[cls | patches | text]``, ``(B, L, D)``, and the model's
``extra``, whose ``image_positions`` says how many of the L positions belong to the image. ``normalize_output`` tells
whether a head wants the encoder's last norm before it; where not, it has one of its own. With ``center`` the
features' running mean is taken away first, other than in BEiT-3: see :class:`CenteredLayerNorm`.
"""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.ranges import check_flag

logger = logging.getLogger(__name__)

_INITIAL_DEVIATION = 0.02
_SMALL_START = 0.001  # of the heads whose logits start at almost zero
_INITIAL_TEMPERATURE = 0.07
_LEAST_WEIGHT = 0.02  # of a new batch in the running mean: it is of the last 50 batches or so


class TaskHeads(nn.ModuleDict):
    """A model's heads by name; empty but in fine-tuning.

    Attributes:
        leaves_out_others: a checkpoint's heads that the model has not, of another task, are left out when it is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._new: set[str] = set()
        self.leaves_out_others = False

    def register(self, name: str, head: nn.Module, may_be_new: bool) -> None:
        """Add a head.

        Args:
            may_be_new: a checkpoint without it, a pre-trained one, leaves it as it is initialised; otherwise a missing
                head is as much an error as any other missing parameter.
        """
        self[name] = head
        if may_be_new:
            self._new.add(name)

    def fit(self, state: dict[str, Any], prefix: str) -> None:
        """Change a state dictionary, its heads' names behind ``prefix``, in place into one that can be loaded."""
        saved = {name: name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
        if self.leaves_out_others:
            for head in sorted(set(saved.values()) - set(self)):
                logger.info(f"the checkpoint's head {head!r} is another task's: it is left out")
            for name in [name for name, head in saved.items() if head not in self]:
                del state[name]
        for head in self._new - set(saved.values()):
            logger.info(f"the checkpoint has no head {head!r}: it starts from its initial weights")
            state.update({f"{prefix}{head}.{name}": value for name, value in self[head].state_dict().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.fit(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LastTokenHead(nn.Linear):
    """Class logits of a causal language model from each row's last token, which has seen all others.

    Args:
        embed_dim: width of the features.
        num_classes: two or more.
        dropout: on the features.

    Raises:
        UserError: naming the flag, its value and the rule.
    """

    def __init__(self, embed_dim: int, num_classes: int, dropout: float) -> None:
        check_flag("num_classes", num_classes)
        check_flag("mhmoe_head_dropout", dropout)
        super().__init__(embed_dim, num_classes)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Small random weights and no bias, so that a new head starts close to indifference."""
        nn.init.normal_(self.weight, std=_INITIAL_DEVIATION)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, padding_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``(B, classes)``, in the precision of the head's parameters.

        Args:
            features: ``(B, S, D)``.
            padding_mask: bool ``(B, S)``, True = padded; every row has a token.
        """
        positions = torch.arange(features.size(1), device=features.device)
        last = positions.masked_fill(padding_mask, 0).amax(dim=1)
        rows = torch.arange(features.size(0), device=features.device)
        return super().forward(self.dropout(features[rows, last].to(self.weight.dtype)))


class _ClassificationHead(nn.Module):
    """What the heads have in common that choose among ``number`` classes."""

    def __init__(self, width: int, number: int, center: bool, what: str = "classes") -> None:
        super().__init__()
        if number < 2:
            raise UserError(f"a classification head needs at least 2 {what}, the data have {number}")
        self.norm = CenteredLayerNorm(width) if center else nn.LayerNorm(width)


class VQAHead(_ClassificationHead):
    """One logit per answer, from the class token: ``(B, L, D) -> (B, answers)``.

    The biases start where one answer of all is expected (the prior of Lin et al., 2017, section 3.3), other than in
    BEiT-3: there the first updates go into unlearning that half of all answers are right.
    """

    normalize_output = False

    def __init__(self, embed_dim: int, num_answers: int, center: bool = False) -> None:
        super().__init__(embed_dim, num_answers, center, "answers")
        self.pooler = _linear(embed_dim, embed_dim)
        self.classifier = _two_layers(embed_dim, 2 * embed_dim, num_answers)
        nn.init.constant_(_last(self.classifier).bias, -math.log(num_answers - 1))

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """Logits."""
        return self.classifier(torch.tanh(self.pooler(self.norm(features[:, 0]))))


class NLVR2Head(_ClassificationHead):
    """Logits of "false" and "true" for a statement about two images, from both class and both first text tokens.

    Only the last layer starts small, in BEiT-3 the first, too: with hidden units that differ from the start, a short
    training gets beyond guessing sooner.
    """

    normalize_output = True

    def __init__(self, embed_dim: int, num_classes: int = 2, center: bool = False) -> None:
        super().__init__(4 * embed_dim, num_classes, center)
        self.classifier = _two_layers(4 * embed_dim, 2 * embed_dim, num_classes)
        _last(self.classifier).weight.data.mul_(_SMALL_START)

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """``(2 B, L, D) -> (B, classes)``: the left images' rows, then the right images', each with the statement."""
        both = torch.cat([features[:, 0], features[:, extra["image_positions"]]], dim=-1)
        left, right = both.chunk(2, dim=0)
        return self.classifier(self.norm(torch.cat([left, right], dim=-1)))


class ImageClassificationHead(_ClassificationHead):
    """Class logits of an image from the mean of its patches, without the class token: ``(B, L, D) -> (B, classes)``."""

    normalize_output = False

    def __init__(self, embed_dim: int, num_classes: int, center: bool = False) -> None:
        super().__init__(embed_dim, num_classes, center)
        self.classifier = _linear(embed_dim, num_classes)
        self.classifier.weight.data.mul_(_SMALL_START)

    def forward(self, features: Tensor, extra: dict[str, Any]) -> Tensor:
        """Logits."""
        patches = features[:, 1 : extra["image_positions"]]
        return self.classifier(self.norm(patches.mean(dim=1)))


class RetrievalHead(nn.Module):
    """A vector of length 1 for an image or a text, from the first token of a sequence of only one of them.

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


class CenteredLayerNorm(nn.LayerNorm):
    """Layer normalisation of features from which their running mean over the training rows is taken away.

    Class tokens of a pre-trained encoder have most of their length in common, and a new head's gradients are of that
    more than of what tells the rows apart. Mean-only batch normalisation (Salimans and Kingma, 2016, section 3), as
    before MAE's linear probe (He et al., 2022, appendix A.1), but by the running mean in training, too. Ranks share it.

    Attributes:
        running_mean: ``(width,)``: of all rows so far, later of the last 50 batches or so.
        num_batches: how many batches it has seen.
        tells_padding: True, see ``moe.layer.taken_for_padding``.
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


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=_INITIAL_DEVIATION)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), _linear(hidden, outputs))


def _last(layers: nn.Sequential) -> nn.Linear:
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    return last

"""Bytes that weights, gradients and optimizer take on one rank, and on rank 0 to save them."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.counts import ModelCounts
from .model_shape import ModelShape


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of fairseq's ways to train.

    Attributes:
        flags: what is typed.
        weights: in the model.
        gradients: of the weights.
        optimizer: copies of weights and gradients in fp32, and Adam's two moments.
        host: in rank 0's memory while it saves: the checkpoint, and half weights until they are made fp32.
    """

    flags: str
    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def total(self) -> int:
        """On a rank, while training."""
        return self.weights + self.gradients + self.optimizer


# fairseq's checkpoints hold weights and Adam's moments in fp32, whatever was trained in.
SAVED_BYTES = 12
# Adam's moments are in fp32 in all of them. fp16 that is flattened is refused at more than one rank per bank.
PRECISIONS = (
    Precision("fp32, --mhmoe-precision", weights=4, gradients=4, optimizer=8, host=12),
    Precision("--fp16 --fp16-no-flatten-grads", weights=2, gradients=2, optimizer=16, host=14),
    Precision("--memory-efficient-fp16", weights=2, gradients=2, optimizer=8, host=14),
)


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one rank: the dense part whole, its share of the experts."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


def rank_parameters(counts: ModelCounts, size: int) -> RankParameters:
    """With ``size`` ranks that share the experts."""
    return RankParameters(counts.non_expert, counts.expert // size)


def rounded_weight_bytes(shape: ModelShape, parameters: RankParameters) -> int:
    """Copies of the weights in the half type that autocast keeps for the backward pass; one layer's if recomputed."""
    if not shape.half:
        return 0
    if not shape.recompute:
        return 2 * parameters.total
    return 2 * (parameters.dense // shape.layers + parameters.expert // max(shape.moe_layers, 1))


def largest_expert_bytes(counts: ModelCounts, size: int) -> int:
    """The largest expert tensor of a rank, in fp32: what saving may add to its device's memory."""
    if counts.moe is None:
        return 0
    return 4 * (counts.moe.num_experts // size) * counts.moe.expert_ffn_dim * counts.moe.subtoken_dim

"""Auxiliary losses as pure functions of sums over sub-tokens. Padding enters neither numerator nor denominator.

The sums of several batches, or of several processes' parts of a batch, add up: the losses of the total are those of
the whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .assignment import Assignment


class RouterSums(NamedTuple):
    """What the losses depend on; of each sequence by itself with a leading dimension for them.

    Attributes:
        chosen_E: how often each expert of all banks was chosen, all choices of one sub-token together counting 1; or
            their gate weights.
        probs_E: the probabilities of all experts, summed over real sub-tokens.
        z: squared log-partition, summed.
        num_real: real sub-tokens.

    >>> sums = RouterSums(torch.tensor([2.0, 0.0]), torch.tensor([1.5, 0.5]), torch.tensor(3.0), torch.tensor(2.0))
    >>> float(load_balancing_loss(sums)), float(router_z_loss(sums))
    (1.5, 1.5)
    >>> sums.over(lambda vector: 2 * vector).chosen_E  # two processes with the same batch
    tensor([4., 0.])
    """

    chosen_E: Tensor
    probs_E: Tensor
    z: Tensor
    num_real: Tensor

    def over(self, add: Callable[[Tensor], Tensor]) -> "RouterSums":
        """The sums of all processes, whose vectors ``(2 E + 2,)`` ``add`` adds up in one message."""
        total = add(torch.cat([self.chosen_E, self.probs_E, self.z.view(1), self.num_real.view(1)]))
        chosen_E, probs_E, z, num_real = total.split([len(self.chosen_E), len(self.probs_E), 1, 1])
        return RouterSums(chosen_E, probs_E, z.squeeze(0), num_real.squeeze(0))


def router_sums(
    logits_NE: Tensor, assignment: Assignment, padding_mask_N: Tensor | None, *, count: str = "top1", banks: int = 1,
    sequences: int | None = None,
) -> RouterSums:  # fmt: skip
    """Sums over the real sub-tokens of a batch.

    Args:
        padding_mask_N: True where padded.
        count: first choices (``"top1"``, GShard), all choices divided by K (``"topk"``), or each choice by its gate
            weight (``"gates"``, arXiv 2403.07816), which has a gradient; a gate scale multiplies these sums, too.
        banks: of experts; consecutive rows are of one after the other.
        sequences: equal parts of the batch, of each of which the sums are; choices are then those of the probabilities,
            without a selection bias (DeepSeek-V3). None for the sums of all.

    >>> gate = Gate(MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=4, top_k=1))
    >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    >>> router_sums(logits, gate(logits), torch.tensor([False, True])).probs_E
    tensor([0.5000, 0.5000])
    >>> logits = torch.tensor([[1.0, 0.5, -0.2, -1.0]])  # gates .6225 and .3775, probabilities .4895 and .2969
    >>> assignment = Gate(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=4, top_k=2))(logits)
    >>> round(float(load_balancing_loss(router_sums(logits, assignment, None, count="gates"))), 4)
    1.667
    """
    probs_NE, choices_NK = assignment.probs_NE, assignment.choices_NK
    experts, parts = probs_NE.size(1), () if sequences is None else (sequences,)
    if sequences is not None and count != "gates":
        choices_NK = probs_NE.topk(choices_NK.size(1)).indices
    if assignment.regulated is None and count == "gates":
        gates_NK = assignment.gates_NK.to(probs_NE.dtype)
        chosen_NE = torch.zeros_like(probs_NE).scatter(1, choices_NK % experts, gates_NK)
    elif assignment.regulated is None:
        counted_NK = (choices_NK[:, :1] if count == "top1" else choices_NK) % experts  # in their bank
        chosen_NE = torch.zeros_like(probs_NE).scatter_(1, counted_NK, 1.0) / counted_NK.size(1)
    else:
        chosen_NE, probs_NE = assignment.regulated
    z_N = torch.logsumexp(logits_NE.to(probs_NE.dtype), dim=1).square()

    rows = z_N.size(0) // (sequences or 1)

    def by_expert(values_NE: Tensor) -> Tensor:
        return values_NE.reshape(*parts, rows // banks, banks * experts).sum(-2)

    def of_all(values_N: Tensor) -> Tensor:
        return values_N.reshape(*parts, rows).sum(-1)

    if padding_mask_N is None:
        return RouterSums(by_expert(chosen_NE), by_expert(probs_NE), of_all(z_N), z_N.new_full(parts, rows))
    mask_N1 = padding_mask_N.unsqueeze(1)
    return RouterSums(
        by_expert(chosen_NE.masked_fill(mask_N1, 0)),
        by_expert(probs_NE.masked_fill(mask_N1, 0)),
        of_all(z_N.masked_fill(padding_mask_N, 0)),
        of_all(~padding_mask_N).to(z_N.dtype),
    )


def load_balancing_loss(sums: RouterSums) -> Tensor:
    """``E * sum_p f_p P_p`` (P1 equation 10, GShard): 1 when both are uniform, 0 without sub-tokens.

    Of sequences it is the mean of those with sub-tokens (DeepSeek-V3's sequence-wise loss, arXiv 2412.19437).

    Over H banks of E it is the mean of the banks' losses: each has an H-th of the sub-tokens, so the shares f and P of
    all are an H-th of those in the bank.

    >>> even = torch.tensor([2.0, 2.0])
    >>> load_balancing_loss(RouterSums(even, even, torch.tensor(0.0), torch.tensor(4.0)))
    tensor(1.)
    """
    num_real = sums.num_real.clamp(min=1).unsqueeze(-1)
    loss = sums.chosen_E.size(-1) * (sums.chosen_E / num_real * (sums.probs_E / num_real)).sum(-1)
    return loss if loss.dim() == 0 else loss.sum() / (sums.num_real > 0).sum().clamp(min=1)


def router_z_loss(sums: RouterSums) -> Tensor:
    """Mean squared log-partition of the router's logits (ST-MoE), of all sequences together.

    >>> even = torch.tensor([2.0, 2.0])
    >>> router_z_loss(RouterSums(even, even, torch.tensor(8.0), torch.tensor(4.0)))
    tensor(2.)
    """
    if sums.z.dim():
        return sums.z.sum() / sums.num_real.sum().clamp(min=1)
    return sums.z / sums.num_real.clamp(min=1)

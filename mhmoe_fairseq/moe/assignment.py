"""What a gate decides."""

from typing import NamedTuple

from torch import Tensor


class Assignment(NamedTuple):
    """Chosen experts and gate weights.

    Attributes:
        probs_NE: the scores as probabilities, in float32 or wider: the softmax, or scores divided by their sum.
        experts_NK: int64, first choice first, counted through all banks; the number of all (the virtual expert) where
            ``kept_NK`` is False.
        gates_NK: weights of the experts' outputs, 0 where not kept.
        choices_NK: the experts chosen before padding, policy and capacity took any away.
        kept_NK: bool, not padding, not refused by the second-expert policy, within capacity; None: all.
        dropped_NK: bool, lost for lack of capacity only; None: none.
        evidence: what the balancing counted in training beside the loads; None for nothing.
        regulated: what the balance loss is of, where it is not the choices and the probabilities: how often each expert
            of the bank was chosen, and its weight, ``(N, E)`` each.

    >>> Gate(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=8, top_k=1))(torch.eye(4)).choices_NK.flatten()
    tensor([0, 1, 2, 3])
    """

    probs_NE: Tensor
    experts_NK: Tensor
    gates_NK: Tensor
    choices_NK: Tensor
    kept_NK: Tensor | None
    dropped_NK: Tensor | None
    evidence: Tensor | None = None
    regulated: tuple[Tensor, Tensor] | None = None

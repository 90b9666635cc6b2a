"""Expert choice (Zhou et al., 2022): experts choose sub-tokens, as many each, in place of sub-tokens experts."""

from torch import Tensor

from .gate import GATES, Assignment, Gate, GateFields


class ExpertChoiceGate(Gate):
    """Every expert takes the C = factor K N / E sub-tokens that score highest with it, of all that are routed together.

    All loads are equal, in evaluation as in training, so there is nothing for a balance loss to do. A sub-token goes to
    0 to E experts, each weighted by its score; ties go to the first sub-token.

    >>> gate = ExpertChoiceGate(GateFields(num_experts=2, top_k=1, routing="expert-choice"))
    >>> gate(torch.tensor([[2.0, 0.0], [1.5, 0.0], [0.0, 1.0], [0.5, 0.2]])).experts_NK  # 2 is the virtual expert
    tensor([[0, 2],
            [0, 2],
            [1, 2],
            [2, 1]])
    """

    drops_tokens = True
    is_balanced = True
    chooses_all = True
    sees_later = "an expert takes the best of all positions, so which of them it takes depends on those that follow"

    @staticmethod
    def mean_choices(config: GateFields) -> float:
        """What the capacity factor makes of K."""
        return config.capacity_factor * config.top_k

    def forward(
        self, logits_NE: Tensor, padding_mask_N: Tensor | None = None, noise: Tensor | None = None
    ) -> Assignment:
        """As the base's; of each sub-token all experts, the most probable first, and which of them took it."""
        config = self.config
        scores_NE = self.score.of(logits_NE)
        offered_NE = scores_NE.detach()
        if padding_mask_N is not None:
            offered_NE = offered_NE.masked_fill(padding_mask_N.unsqueeze(1), -1)  # behind every real one
        of_bank = self._num_real_of_bank(logits_NE, padding_mask_N)
        slots = self.mean_choices(config) * of_bank.double() / config.num_experts
        slots = slots.floor().clamp(min=1).minimum(of_bank)

        # Of several banks a token's sub-tokens stand side by side, each offered to its own bank's experts.
        offered = offered_NE.view(-1, config.total_experts)
        ranks_NE = offered.argsort(dim=0, descending=True, stable=True).argsort(dim=0).view_as(offered_NE)
        experts_NE, gates_NE, choices_NE, kept_NE = self._by_weight(scores_NE, ranks_NE < slots)
        return Assignment(self.score.probabilities(scores_NE), experts_NE, gates_NE, choices_NE, kept_NE, None)


GATES["expert-choice"] = ExpertChoiceGate

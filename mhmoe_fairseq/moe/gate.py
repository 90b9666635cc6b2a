"""Gates: from the router's logits to the experts of each sub-token and the weights of their outputs.

Nothing here depends on values on the host: padded and dropped assignments go to a *virtual expert* E behind the real
ones, so every shape is known beforehand and no device synchronisation is needed.

A new gate is a subclass of :class:`Gate` in ``GATES``, and the fields it needs in :class:`GateFields`.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..common.ranges import ANY
from ._fields import ConfigError, Positive
from .assignment import Assignment
from .balancing import BALANCINGS, BalancingFields
from .banks import of_all_banks
from .dispatch import sort_by_expert
from .groups import GroupFields, outside_kept_groups
from .scores import SCORES

GATES: "dict[str, type[Gate]]" = {}


@dataclass(frozen=True, kw_only=True)
class GateFields(BalancingFields, GroupFields):
    """What :class:`MHMoEConfig` says about the choice of experts.

    Args:
        num_experts: experts E, of each bank.
        top_k: experts per sub-token K.
        routing: a name in ``GATES``: ``"dropless"``, ``"capacity"`` (the choices of GShard and TorchScale) or
            ``"expert-choice"``, by which experts choose sub-tokens.
        gate_score: a name in ``SCORES``: ``"softmax"`` or ``"sigmoid"`` of the router's logits; ``"logit"``: softmax,
            with the bias of ``balancing`` on the logits.
        normalize_gates: gate weights are the chosen experts' scores divided by their sum when K >= 2; False, and with
            K = 1: the scores as they are.
        gate_scale: what the gate weights are multiplied by in the end.
        normalize_before_dropping: with capacity routing, renormalise before dropping.
        second_expert_policy: GShard's policy for the second expert; training with K = 2 only.
        capacity_factor: training capacity = int(factor * K * ceil(N / E)) slots per expert; with expert choice what an
            expert takes, int(factor * K * N / E).
        eval_capacity_fraction: evaluation capacity as a fraction of the sub-tokens; 0 or below: the training rule.

    >>> GateFields(num_experts=4).routing
    'dropless'
    """

    routing: Annotated[str, GATES] = "dropless"
    gate_score: Annotated[str, SCORES] = "softmax"
    normalize_gates: bool = True
    gate_scale: Positive = 1.0
    normalize_before_dropping: bool = False
    second_expert_policy: Literal["all", "sampling", "random"] = "all"
    capacity_factor: Positive = 1.0
    eval_capacity_fraction: Annotated[float, ANY] = 0.25

    @property
    def total_experts(self) -> int:
        """Experts of all banks."""
        return self.num_banks * self.num_experts

    @property
    def experts_in_words(self) -> str:
        """Their number, of several banks ``"4 x 8"``."""
        return f"{self.num_experts}" if self.num_banks == 1 else f"{self.num_banks} x {self.num_experts}"

    def check_gate(self) -> None:
        """Refuse fields that contradict each other."""
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", self.top_k, f"must be at most {{num_experts}} ({self.num_experts})")
        if self.second_expert_policy != "all" and self.top_k != 2:
            raise ConfigError("second_expert_policy", self.second_expert_policy, f"needs {{top_k}} 2, not {self.top_k}")
        if self.second_expert_policy != "all" and self.gate_score != "softmax":
            rule = f"draws by probabilities: it needs {{gate_score}} softmax, not {self.gate_score}"
            raise ConfigError("second_expert_policy", self.second_expert_policy, rule)
        if self.gate_score == "logit" and self.balancing == "none":
            raise ConfigError("gate_score", self.gate_score, "is softmax without a {balancing}, which is none")
        if self.second_expert_policy == "sampling" and self.balancing != "none":
            rule = f"draws by logits, which a bias of scores does not reach; {{balancing}} is {self.balancing}"
            raise ConfigError("second_expert_policy", self.second_expert_policy, rule)
        gate = GATES.get(self.routing)  # none of merged experts, which have routings of their own
        if self.balancing != "none" and gate is not None and gate.is_balanced:
            rule = f"has nothing to balance: {{routing}} {self.routing} gives every expert the same load"
            raise ConfigError("balancing", self.balancing, rule)
        self.check_balancing()
        self.check_groups()
        limits = self.expert_groups > 1
        if limits and self.balancing == "quantile":
            rule = f"ranks margins over all experts; {{expert_groups}} ({self.expert_groups}) leave some out"
            raise ConfigError("balancing", self.balancing, rule)
        if limits and gate is not None and gate.chooses_all:
            rule = f"limits which experts a sub-token chooses; with {{routing}} {self.routing} it has no such choice"
            raise ConfigError("expert_groups", self.expert_groups, rule)
        if gate is not None:
            gate.check(self)


class Gate(nn.Module):
    """Scores, then the K best experts of every sub-token; no expert is ever full.

    Who wants to know what is chosen, such as an analysis, registers a forward hook here.

    Attributes:
        balancing: the bias that choices are made with; None for none.
        drops_tokens: whether experts may refuse tokens, so that a token's output depends on the others of its batch.
        is_balanced: whether loads are equal whatever the router says, so that a balance loss has nothing to do.
        chooses_all: whether the choices are all experts of the bank, of which only those that are kept were chosen.
        sees_later: why the positions of a sequence depend on later ones, so that language models refuse it; empty where
            they do not, or only by what is dropped.

    >>> Gate(GateFields(num_experts=2))(torch.tensor([[3.0, 1.0]])).gates_NK
    tensor([[0.8808, 0.1192]])
    """

    drops_tokens = False
    is_balanced = False
    chooses_all = False
    sees_later: ClassVar[str] = ""

    def __init__(self, config: GateFields) -> None:
        super().__init__()
        self.config = config
        self.score = SCORES[config.gate_score]
        balancing = BALANCINGS[config.balancing]
        self.balancing = None if balancing is None else balancing(config)

    def forward(
        self, logits_NE: Tensor, padding_mask_N: Tensor | None = None, noise: Tensor | None = None
    ) -> Assignment:
        """Choose experts and weights, in four steps: choose, apply the policy, apply the capacity, weigh.

        Args:
            padding_mask_N: True where padded.
            noise: Gumbel noise ``(N, E)`` (policy ``sampling``) or uniform ``(N,)`` (``random``) in place of fresh
                draws. The policies apply in training only; evaluation draws no random number.
        """
        config = self.config
        policy = config.second_expert_policy if self.training else "all"
        normalizes = config.normalize_gates and config.top_k > 1
        normalizes_first = config.normalize_before_dropping or not (self.drops_tokens or policy == "random")

        scores_NE = self.score.of(logits_NE)
        probs_NE = self.score.probabilities(scores_NE)
        if policy == "sampling" and noise is None:
            noise = gumbel_noise(logits_NE)
        first_NE, following_NE, evidence = scores_NE, logits_NE, None
        if self.balancing is not None:
            first_NE = following_NE = self.balancing(self.score.chosen_by(logits_NE, scores_NE))
            evidence = self.balancing.evidence(first_NE, padding_mask_N) if self.training else None
        if config.expert_groups > 1:
            # Not 0, as in transformers' DeepSeek-V3: biased scores may be negative.
            outside_NE = outside_kept_groups(first_NE, config)
            first_NE, following_NE = (of.masked_fill(outside_NE, float("-inf")) for of in (first_NE, following_NE))
        choices_NK = top_k_experts(following_NE, first_NE, config.top_k, noise if policy == "sampling" else None)
        gates_NK = scores_NE.gather(1, choices_NK)
        if normalizes and normalizes_first:
            gates_NK = self.score.normalized(gates_NK)
        choices_NK = of_all_banks(choices_NK, config.num_banks, config.num_experts)

        chosen_NK = None if padding_mask_N is None else (~padding_mask_N).unsqueeze(1).expand_as(gates_NK)
        if policy == "random":  # GShard: the second expert is used with probability min(1, 2 g_2)
            uniform = torch.rand_like(gates_NK[:, 1]) if noise is None else noise
            used_NK = torch.stack([torch.ones_like(uniform, dtype=torch.bool), 2 * gates_NK[:, 1] > uniform], dim=1)
            chosen_NK = used_NK if chosen_NK is None else chosen_NK & used_NK

        kept_NK, dropped_NK = self._apply_capacity(choices_NK, chosen_NK, padding_mask_N)
        if kept_NK is None:
            return Assignment(probs_NE, choices_NK, self._scaled(gates_NK), choices_NK, None, None, evidence)
        gates_NK = gates_NK.masked_fill(~kept_NK, 0)
        if normalizes and not normalizes_first:
            gates_NK = self.score.normalized(gates_NK)
        experts_NK = choices_NK.masked_fill(~kept_NK, config.total_experts)
        return Assignment(probs_NE, experts_NK, self._scaled(gates_NK), choices_NK, kept_NK, dropped_NK, evidence)

    @classmethod
    def check(cls, config: GateFields) -> None:
        """Refuse, with a ConfigError, what this gate cannot do; by default nothing."""

    @staticmethod
    def mean_choices(config: GateFields) -> float:
        """How many experts a sub-token goes to, on average, where none is dropped."""
        return config.top_k

    @classmethod
    def most_choices(cls, config: GateFields) -> int:
        """How many experts a sub-token can go to."""
        return config.num_experts if cls.chooses_all else config.top_k

    def _scaled(self, gates_NK: Tensor) -> Tensor:
        scale = self.config.gate_scale
        return gates_NK if scale == 1 else gates_NK * scale

    def _num_real_of_bank(self, like_N: Tensor, padding_mask_N: Tensor | None) -> Tensor:
        """How many sub-tokens that are not padding each bank is offered."""
        if padding_mask_N is None:
            num_real = torch.full((), like_N.size(0), device=like_N.device)
        else:
            num_real = (~padding_mask_N).sum()
        return torch.div(num_real, self.config.num_banks, rounding_mode="floor")

    def _by_weight(self, weights_NE: Tensor, used_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts, gates, choices and kept of a gate that ``chooses_all``: the experts of most weight first."""
        config = self.config
        choices_NE = weights_NE.detach().argsort(dim=1, descending=True, stable=True)
        kept_NE = used_NE.gather(1, choices_NE)
        gates_NE = self._scaled(weights_NE.gather(1, choices_NE).masked_fill(~kept_NE, 0))
        choices_NE = of_all_banks(choices_NE, config.num_banks, config.num_experts)
        return choices_NE.masked_fill(~kept_NE, config.total_experts), gates_NE, choices_NE, kept_NE

    def _apply_capacity(
        self, choices_NK: Tensor, chosen_NK: Tensor | None, padding_mask_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which of the chosen assignments are kept (None: all), and which are dropped (None: none)."""
        return chosen_NK, None


class CapacityGate(Gate):
    """As GShard's and TorchScale's gates: an expert takes what comes first, and drops what is over its capacity.

    With K = 1 what is dropped depends on no later position of a sequence. With more it does, where anything is dropped:
    all first choices queue before all second ones, those of later positions, too.

    >>> gate = CapacityGate(GateFields(num_experts=2, top_k=1, routing="capacity"))
    >>> gate(torch.tensor([[1.0, 0.0]] * 3)).kept_NK.flatten()  # 3 sub-tokens, 2 slots for each expert
    tensor([ True,  True, False])
    """

    drops_tokens = True

    def _apply_capacity(
        self, choices_NK: Tensor, chosen_NK: Tensor | None, padding_mask_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if chosen_NK is None:
            chosen_NK = torch.ones_like(choices_NK, dtype=torch.bool)
        slots_NK = slot_positions(choices_NK.masked_fill(~chosen_NK, config.total_experts), config.total_experts)
        num_of_bank = self._num_real_of_bank(choices_NK, padding_mask_N)
        within_NK = slots_NK < expert_capacity(config, num_of_bank, training=self.training)
        return chosen_NK & within_NK, chosen_NK & ~within_NK


GATES.update(dropless=Gate, capacity=CapacityGate)


def top_k_experts(logits_NE: Tensor, scores_NE: Tensor, k: int, noise_NE: Tensor | None = None) -> Tensor:
    """The K best experts per row, ``(N, K)``; ties go to the lowest index, as in GShard.

    The first choice is the argmax of the scores, the following ones of the remaining logits: two different logits can
    round to one score, and TorchScale chooses so. With a bias, both are the biased scores. ``noise_NE`` is added for
    all choices but the first.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
    >>> top_k_experts(logits, logits.softmax(1), 2)
    tensor([[1, 2]])
    """
    chosen = [scores_NE.argmax(dim=1, keepdim=True)]
    rest = logits_NE.detach() if noise_NE is None else logits_NE.detach() + noise_NE
    for _ in range(k - 1):
        rest = rest.scatter(1, chosen[-1], float("-inf"))
        chosen.append(rest.argmax(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise (policy ``sampling``).

    >>> gumbel_noise(torch.empty(2, 3)).shape
    torch.Size([2, 3])
    """
    return -torch.empty_like(like).exponential_().log()


def expert_capacity(config: GateFields, num_subtokens: Tensor, *, training: bool) -> Tensor:
    """Slots per expert as GShard and TorchScale count them: ``int(factor * K * ceil(N / E))``, in evaluation
    ``ceil(fraction * N)``; at least one.

    ``num_subtokens`` is a 0-dim integer tensor (a bank's real sub-tokens), so that counting padding costs no
    synchronisation.

    >>> expert_capacity(GateFields(num_experts=4, capacity_factor=1.25), torch.tensor(8), training=True)
    tensor(5., dtype=torch.float64)
    """
    num = num_subtokens.to(torch.float64)
    if not training and config.eval_capacity_fraction > 0:
        return (config.eval_capacity_fraction * num).ceil()
    return (config.capacity_factor * config.top_k * (num / config.num_experts).ceil()).floor().clamp(min=1)


def slot_positions(experts_NK: Tensor, num_experts: int) -> Tensor:
    """Position of every assignment in its expert's queue, ``(N, K)``.

    All first choices queue before all second ones, each in row order (GShard). Rows of the virtual expert get
    positions too; they mean nothing.

    >>> slot_positions(torch.tensor([[0, 1], [0, 1], [1, 0]]), num_experts=2).tolist()
    [[0, 1], [1, 2], [0, 2]]
    """
    n, k = experts_NK.shape
    flat_KN = experts_NK.t().reshape(-1)
    order, offsets_E = sort_by_expert(flat_KN, num_experts)
    starts = torch.cat([offsets_E.new_zeros(1), offsets_E]).long()
    positions = torch.arange(n * k, device=flat_KN.device) - starts.index_select(0, flat_KN.index_select(0, order))
    return torch.empty_like(flat_KN).scatter_(0, order, positions).view(k, n).t()

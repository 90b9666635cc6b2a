"""How MH-MoE routes: logits, scores, the chosen experts and their weights, and the balance loss of a layer.

Letters as in ``modeling_mhmoe.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mhmoe import MHMoEConfig

_MIN_TEMPERATURE = 1e-2


class MHMoERouter(nn.Module):
    """One logit for each sub-token and expert. Its weights are plain parameters: engines replace ``nn.Linear``."""

    selection_bias: nn.Parameter | None
    regularizer: nn.Parameter | None

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.config = config
        e, r, d = config.mhmoe_experts, config.mhmoe_router_dim, config.subtoken_size
        d = config.hidden_size if config.mhmoe_router_input == "token" else d
        if config.mhmoe_router == "linear":
            self.weight = nn.Parameter(torch.empty(e, d))
            return
        self.reduction = nn.Parameter(torch.empty(r, d))
        self.expert_embedding = nn.Parameter(torch.empty(e, r))
        if config.mhmoe_router_temperature is not None:
            self.temperature = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, d) -> (N, E)``."""
        config = self.config
        x = x.float() if config.mhmoe_router_fp32 else x
        if config.mhmoe_router == "linear":
            return F.linear(x, self.weight.to(x.dtype))
        x = F.linear(x, self.reduction.to(x.dtype))
        if config.mhmoe_router_cosine:
            x = F.normalize(x, dim=1, eps=1e-4)
        logits = F.linear(x, F.normalize(self.expert_embedding.to(x.dtype), dim=1, eps=1e-4))
        if config.mhmoe_router_temperature is not None:
            logits = logits / self.temperature.to(x.dtype).clamp(min=_MIN_TEMPERATURE)
        return logits


class MHMoEHeadRouters(nn.ModuleList):
    """A router for each head, whose sub-tokens are every H-th."""

    selection_bias: nn.Parameter | None
    regularizer: nn.Parameter | None

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__(MHMoERouter(config) for _ in range(config.banks))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, d) -> (N, E)``."""
        by_head = x.unflatten(0, (-1, len(self))).unbind(1)
        return torch.stack([router(of_head) for router, of_head in zip(self, by_head)], dim=1).flatten(0, 1)


def build_router(config: MHMoEConfig) -> MHMoERouter | MHMoEHeadRouters:
    """The router or routers of a layer.

    With their bias ``(banks, E)`` if choices have one, and the weight of ReMoE's regularizer, a scalar.
    """
    router = MHMoERouter(config) if config.banks == 1 else MHMoEHeadRouters(config)
    bias = torch.empty(config.banks, config.mhmoe_experts) if config.mhmoe_selection_bias else None
    weight = torch.empty(()) if config.mhmoe_gate_score == "relu" else None
    for name, value in {"selection_bias": bias, "regularizer": weight}.items():
        router.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
    return router


def expert_scores(logits: Tensor, config: MHMoEConfig) -> Tensor:
    """What experts are chosen and weighed by, ``(N, E)`` in float32."""
    logits = logits.float()
    if config.mhmoe_gate_score == "relu":
        return logits.relu()
    return logits.sigmoid() if config.mhmoe_gate_score == "sigmoid" else torch.softmax(logits, dim=1)


def normalized(scores: Tensor, config: MHMoEConfig) -> Tensor:
    """Scores that sum to one per row; the least sum is DeepSeek-V3's or TorchScale's."""
    least = 1e-20 if config.mhmoe_gate_score == "sigmoid" else torch.finfo(scores.dtype).eps
    return scores / scores.sum(1, keepdim=True).clamp(min=least)


def outside_kept_groups(scores: Tensor, config: MHMoEConfig) -> Tensor:
    """Which experts a sub-token may not choose, ``(N, E)``; of equal groups the first is kept."""
    by_group = scores.detach().unflatten(1, (config.mhmoe_expert_groups, -1))
    best = by_group.topk(2 if config.mhmoe_group_score == "top2" else 1, dim=2).values.sum(2)
    kept = best.argsort(dim=1, descending=True, stable=True)[:, : config.mhmoe_kept_groups]
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
    return outside.repeat_interleave(by_group.size(2), dim=1)


def choose(logits: Tensor, scores: Tensor, config: MHMoEConfig, top_k: int, bias: Tensor | None = None) -> Tensor:
    """The K best experts of every row, ``(N, K)``, each numbered in its bank; ties go to the first.

    By scores, with a bias ``(banks, E)`` if there is one.
    """
    if bias is not None:
        biased = logits.float() if config.mhmoe_gate_score == "logit" else scores
        logits = scores = (biased.unflatten(0, (-1, config.banks)) + bias.float()).flatten(0, 1)
    if config.mhmoe_expert_groups > 1:
        outside = outside_kept_groups(scores, config)
        logits, scores = (of.masked_fill(outside, float("-inf")) for of in (logits, scores))
    chosen, rest = [scores.argmax(dim=1, keepdim=True)], logits.detach()
    for _ in range(top_k - 1):
        rest = rest.scatter(1, chosen[-1], float("-inf"))
        chosen.append(rest.argmax(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def gate(logits: Tensor, config: MHMoEConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of every sub-token and the weights of their outputs, ``(N, K)`` each; a bias enters no weight.

    Expert e of head h is number h E + e, where heads have banks of their own. Of ReMoE K is E, and most weights are 0.
    """
    scores = expert_scores(logits, config)
    if config.mhmoe_gate_score == "relu":
        index, weights = torch.arange(scores.size(1), device=scores.device).repeat(len(scores), 1), scores
    else:
        index = choose(logits, scores, config, config.mhmoe_top_k, bias)
        weights = scores.gather(1, index)
        if config.mhmoe_normalize_gates and config.mhmoe_top_k > 1:
            weights = normalized(weights, config)
    if config.banks > 1:
        head = torch.arange(len(index), device=index.device) % config.banks
        index = index + (head * config.mhmoe_experts)[:, None]
    return index, weights * config.mhmoe_gate_scale


def _choices_and_probabilities(
    logits: Tensor, router: MHMoERouter | MHMoEHeadRouters, config: MHMoEConfig
) -> tuple[Tensor, Tensor]:
    """How often each expert of its bank counts as chosen, all choices of a sub-token counting 1, and its probability.

    ``(N, E)`` each; of ReMoE all that are used count 1 / K, and for the probability stands the regularizer's weight
    times the expert's.
    """
    scores, number = expert_scores(logits, config), 1 if config.mhmoe_balance == "top1" else config.mhmoe_top_k
    if router.regularizer is not None:
        return (scores > 0) / config.mhmoe_top_k, router.regularizer * scores
    if config.mhmoe_balance == "gates":
        index, counted = gate(logits, config, router.selection_bias)
    elif config.mhmoe_balance_scope == "sequence":
        index, counted = scores.topk(number).indices, scores.new_full((1, 1), 1 / number)
    else:
        index = choose(logits, scores, config, number, router.selection_bias)
        counted = scores.new_full((1, 1), 1 / number)
    probabilities = normalized(scores, config) if config.mhmoe_gate_score == "sigmoid" else scores
    return torch.zeros_like(scores).scatter(1, index % logits.size(1), counted.expand(index.shape)), probabilities


def balance_loss(
    logits: Tensor,
    router: MHMoERouter | MHMoEHeadRouters,
    real: Tensor | None,
    config: MHMoEConfig,
    sequences: int,
) -> Tensor:
    """``E * sum_p f_p P_p`` of a layer's logits ``(N, E)``, 1 when the load is uniform; ``real``: 0 where padded.

    Of several banks it is the mean of theirs; where the config says so, of each of ``sequences`` by itself, too.
    """
    parts = sequences if config.mhmoe_balance_scope == "sequence" else 1
    chosen, probabilities = _choices_and_probabilities(logits, router, config)
    weights = probabilities.new_ones(len(logits), 1) if real is None else real[:, None].to(probabilities)
    experts = config.banks * logits.size(1)
    count = weights.reshape(parts, -1).sum(1, keepdim=True)
    chosen, probabilities = (
        (of * weights).reshape(parts, -1, experts).sum(1) / count.clamp(min=1) for of in (chosen, probabilities)
    )
    return experts * (chosen * probabilities).sum() / (count > 0).sum().clamp(min=1)

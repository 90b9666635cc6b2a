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

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.config = config
        e, r, d = config.mhmoe_experts, config.mhmoe_router_dim, config.hidden_size // config.mhmoe_heads
        has_bias = config.mhmoe_selection_bias
        self.selection_bias = nn.Parameter(torch.empty(1, e), requires_grad=False) if has_bias else None
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


def expert_scores(logits: Tensor, config: MHMoEConfig) -> Tensor:
    """What experts are chosen and weighed by, ``(N, E)`` in float32."""
    return logits.float().sigmoid() if config.mhmoe_gate_score == "sigmoid" else torch.softmax(logits.float(), dim=1)


def normalized(scores: Tensor, config: MHMoEConfig) -> Tensor:
    """Scores that sum to one per row; the least sum is DeepSeek-V3's or TorchScale's."""
    least = 1e-20 if config.mhmoe_gate_score == "sigmoid" else torch.finfo(scores.dtype).eps
    return scores / scores.sum(1, keepdim=True).clamp(min=least)


def choose(logits: Tensor, scores: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """The K best experts of every row, ``(N, K)``, by scores with a bias if there is one; ties go to the first."""
    if bias is not None:
        logits = scores = scores + bias.float()
    chosen, rest = [scores.argmax(dim=1, keepdim=True)], logits.detach()
    for _ in range(top_k - 1):
        rest = rest.scatter(1, chosen[-1], float("-inf"))
        chosen.append(rest.argmax(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def gate(logits: Tensor, config: MHMoEConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of every sub-token and the weights of their outputs, ``(N, K)`` each; a bias enters no weight."""
    scores = expert_scores(logits, config)
    index = choose(logits, scores, config.mhmoe_top_k, bias)
    weights = scores.gather(1, index)
    if config.mhmoe_normalize_gates and config.mhmoe_top_k > 1:
        weights = normalized(weights, config)
    return index, weights * config.mhmoe_gate_scale


def balance_loss(logits: Tensor, real: Tensor | None, config: MHMoEConfig) -> Tensor:
    """``E * sum_p f_p P_p`` of a layer's logits ``(N, E)``, 1 when the load is uniform; ``real``: 0 where padded.

    Of the choices without a selection bias.
    """
    scores = expert_scores(logits, config)
    index = choose(logits, scores, 1 if config.mhmoe_balance == "top1" else config.mhmoe_top_k)
    probabilities = scores if config.mhmoe_gate_score == "softmax" else normalized(scores, config)
    chosen = torch.zeros_like(probabilities).scatter_(1, index, 1.0) / index.size(1)
    weights = probabilities.new_ones(len(logits), 1) if real is None else real[:, None].to(probabilities)
    count = weights.sum().clamp(min=1)
    return logits.size(1) * ((chosen * weights).sum(0) / count * ((probabilities * weights).sum(0) / count)).sum()

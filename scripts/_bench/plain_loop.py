"""The loop over experts that everyone writes first: the reference for time, memory and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .setting import Setting


class PlainLoop(nn.Module):
    """Select an expert's rows, two linear maps around GELU, weight, ``index_add``; autograd does the rest.

    Takes our layer's weights through :meth:`copy_from`, and then equals it.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        dim, sub_dim, num_experts = setting.embed_dim, setting.sub_dim, setting.num_experts
        self.head_projection = nn.Linear(dim, dim)
        self.merge_projection = nn.Linear(dim, dim)
        self.reduction = nn.Linear(sub_dim, setting.config().router_dim, bias=False)
        self.expert_embedding = nn.Parameter(torch.randn(num_experts, self.reduction.out_features))
        self.fc1 = nn.ModuleList(nn.Linear(sub_dim, setting.ffn_dim) for _ in range(num_experts))
        self.fc2 = nn.ModuleList(nn.Linear(setting.ffn_dim, sub_dim) for _ in range(num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates ``(N, K)``, experts ``(N, K)`` and the balance loss of sub-tokens ``(N, d)``."""
        logits = F.linear(self.reduction(x).float(), F.normalize(self.expert_embedding.float(), dim=1))
        probabilities = logits.softmax(dim=-1)
        gates, experts = probabilities.topk(self.setting.top_k, dim=-1)
        if self.setting.top_k > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        num_experts = self.setting.num_experts
        share = torch.bincount(experts[:, 0], minlength=num_experts) / len(x)
        return gates, experts, num_experts * (share * probabilities.mean(dim=0)).sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sub_tokens = self.head_projection(x).view(-1, self.setting.sub_dim)
        gates, experts, balance = self.route(sub_tokens)
        gates = gates.to(x.dtype)
        total = torch.zeros_like(sub_tokens)
        for expert, (fc1, fc2) in enumerate(zip(self.fc1, self.fc2)):
            row, choice = torch.where(experts == expert)
            output = fc2(F.gelu(fc1(sub_tokens[row])))
            total = total.index_add(0, row, output * gates[row, choice, None])
        return self.merge_projection(total.view_as(x)), balance

    def named_like_ours(self) -> dict[str, list[Tensor]]:
        """Our parameter names, each with the tensors here that stacked make it up."""
        names = {
            f"{projection}.0.{part}": [getattr(getattr(self, projection), part)]
            for projection in ("head_projection", "merge_projection")
            for part in ("weight", "bias")
        }
        for layers in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                names[f"experts.{layers}_{part}"] = [getattr(layer, part) for layer in getattr(self, layers)]
        return {
            **names,
            "router.reduction.weight": [self.reduction.weight],
            "router.expert_embedding": [self.expert_embedding],
        }

    @torch.no_grad()
    def copy_from(self, ours: nn.Module) -> None:
        """Take the weights of our layer."""
        source = dict(ours.named_parameters())
        for name, targets in self.named_like_ours().items():
            for target, value in zip(targets, source[name].view(len(targets), *targets[0].shape)):
                target.copy_(value)

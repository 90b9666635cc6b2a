"""The time the layer's matrix products alone would take: no router, no sort, no activation, no sums."""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_fairseq.moe import MHMoEConfig


class _Product:
    """One linear map of ``rows`` rows with its two backward products, all outputs preallocated."""

    def __init__(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.x, self.weight, self.grad = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
        self.y = torch.empty(rows, outputs, dtype=dtype)
        self.grad_x = torch.empty(rows, inputs, dtype=dtype)
        self.grad_weight = torch.empty(outputs, inputs, dtype=dtype)

    def forward(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)

    def backward(self) -> None:
        torch.mm(self.grad, self.weight, out=self.grad_x)
        torch.mm(self.grad.t(), self.x, out=self.grad_weight)


class GemmBound:
    """Every matrix product of one forward and backward pass as ``torch.mm`` into preallocated outputs.

    A projection is one product over all tokens; each expert has its products over an equal share of
    the rows, so that the expert weights are as large, and read as often, as the layer's.
    """

    def __init__(self, config: MHMoEConfig, tokens: int, dtype: torch.dtype) -> None:
        dim, sub_dim = config.embed_dim, config.subtoken_dim
        inward = [(sub_dim, config.expert_ffn_dim)] * (config.matrices_per_expert - 1)
        experts = [
            _Product(rows, *shape, dtype)
            for rows in equal_shares(tokens * config.split_heads * config.top_k, config.num_experts)
            for shape in (*inward, (config.expert_ffn_dim, sub_dim))
        ]
        before, after = (
            [_Product(tokens, dim, dim, dtype) for _ in range(has * config.num_projection_layers)]
            for has in (config.has_head_projection, config.has_merge_projection)
        )
        self.products = [*before, *experts, *after]

    def __call__(self) -> None:
        for product in self.products:
            product.forward()
        for product in reversed(self.products):
            product.backward()


def equal_shares(rows: int, parts: int) -> list[int]:
    """``rows`` in ``parts`` whole shares that differ by at most one."""
    share, rest = divmod(rows, parts)
    return [share + (part < rest) for part in range(parts)]

"""Rows of all ranks on every rank, with gradients back to the rank that made them: for losses that compare rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows, in the order of the ranks, which may have different numbers of them.

    Every rank must call it, and if one needs gradients all must: in the backward pass each gets the sum of what all
    ranks' losses say about its own rows.

    Args:
        rows: ``(n, ...)`` of this rank; the shapes but for n, and the types, are one on all ranks.

    Returns:
        ``(sum of n, ...)``, and where this rank's begin.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    own = torch.tensor([rows.size(0)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    counts = [int(size) for size in sizes]
    return _GatherRows.apply(rows, counts), sum(counts[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.size(0)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _OwnRowsOfSum.apply(gradient, ctx.counts), None


class _OwnRowsOfSum(torch.autograd.Function):
    """The transpose of ``_GatherRows``, so that gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        total = rows.contiguous().clone()
        dist.all_reduce(total)
        start = sum(counts[: dist.get_rank()])
        return total[start : start + counts[dist.get_rank()]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(gradient, ctx.counts), None

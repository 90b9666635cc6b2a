"""One MH-MoE layer on several ranks, and the same in one process: what both sides of the comparison compute."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.parallel import DistributedExperts, TrafficCounter, expert_parallelism

FIELDS = {"embed_dim": 24, "num_heads": 4, "num_experts": 8, "top_k": 2, "expert_ffn_dim": 16}


@dataclass(frozen=True)
class Case:
    """``tokens[r]`` tokens on rank r, of which the last ``padded[r]`` are padding."""

    tokens: tuple[int, ...]
    padded: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    training: bool = True
    by: str = "experts"
    router_scale: float = 1.0  # large: a few experts get everything, the others nothing

    @property
    def config(self) -> MHMoEConfig:
        return MHMoEConfig(**{**FIELDS, **self.fields})

    def layer(self, parallel=None) -> MHMoELayer:
        torch.manual_seed(self.seed)
        layer = MHMoELayer(self.config, backend=self.backend, parallel=parallel).to(self.dtype).train(self.training)
        for buffer in layer.buffers():  # a selection that was balanced for a while
            buffer.normal_(std=0.1)
        if self.router_scale != 1.0:
            with torch.no_grad():
                for parameter in layer.router.parameters():
                    parameter.mul_(self.router_scale)
        return layer

    def batch(self, rank: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Input, padding mask, and the weights of the outputs in the loss."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        shape = (self.tokens[rank], self.config.embed_dim)
        x, weights = (torch.randn(shape, generator=generator, dtype=self.dtype) for _ in range(2))
        mask = None
        if self.padded is not None:
            mask = torch.arange(self.tokens[rank]) >= self.tokens[rank] - self.padded[rank]
        return x.requires_grad_(), mask, weights

    def domain(self, rank: int) -> Tensor | None:
        """Of each token, where the caller names it: several, but not all of them on every rank."""
        if self.config.router != "domain":
            return None
        return (torch.arange(self.tokens[rank]) * (rank + 1)) % self.config.num_experts


@dataclass
class Result:
    """What one rank, or the single process, computed."""

    hidden: Tensor
    losses: Tensor
    x_grad: Tensor
    grads: dict[str, Tensor]
    load: Tensor
    evidence: Tensor | None
    traffic: tuple[int, int] | None = None
    counted: tuple[int, int, int] | None = None


def loss_of(output, weights: Tensor) -> Tensor:
    return (output.hidden * weights).sum() + 3 * output.balance_loss + 2 * output.z_loss


def run_rank(case: Case, parallel: DistributedExperts) -> Result:
    """One rank's part; its gradients are those of its own loss."""
    parallel.counter = TrafficCounter()
    layer = case.layer(parallel)
    x, mask, weights = case.batch(dist.get_rank())
    output = layer(x, mask, case.domain(dist.get_rank()))
    loss_of(output, weights).backward()
    return Result(
        output.hidden.detach(),
        torch.stack([output.balance_loss, output.z_loss]).detach(),
        x.grad,
        gradients_of(layer),
        output.stats.expert_load,
        output.evidence,
        output.traffic,
        (parallel.counter.calls, parallel.counter.rows, parallel.counter.bytes),
    )


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """By parameter, zero where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def merge_parameters(by_rank: list[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """What one process has: the experts of the first bank, and the rest from any rank."""
    return {
        name: torch.cat([part[name] for part in by_rank[:size]]) if is_sharded(name, size) else value
        for name, value in by_rank[0].items()
    }


def merge_gradients(by_rank: list[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """As training does it: dense gradients averaged over the ranks, the experts' summed over their replicas."""
    merged = {}
    for name in by_rank[0]:
        gradients = [gradient[name] for gradient in by_rank]
        if is_sharded(name, size):
            merged[name] = torch.cat([sum(gradients[first::size]) for first in range(size)])
        else:
            merged[name] = sum(gradients) / len(gradients)
    return merged


def is_sharded(name: str, size: int) -> bool:
    """Whether a parameter of that name is spread over the ranks."""
    return size > 1 and "experts" in name.split(".")


def run_ranks(cases: list[Case], size: int) -> list[Result]:
    parallel = {by: expert_parallelism(size, by) for by in ("experts", "heads")}
    return [run_rank(case, parallel[case.by]) for case in cases]


def run_alone(case: Case) -> list[Result]:
    """All ranks' batches in one process; the loss is the mean of the ranks' losses.

    With ``balance_scope="global"`` they are one batch, else one micro-batch after the other.
    """
    layer, world_size = case.layer(), len(case.tokens)
    batches = [case.batch(rank) for rank in range(world_size)]
    if case.config.balance_scope == "global":
        masks = None if case.padded is None else torch.cat([mask for _, mask, _ in batches])
        output = layer(torch.cat([x for x, _, _ in batches]), masks)
        rows = [len(x) for x, _, _ in batches]
        outputs = [output._replace(hidden=hidden) for hidden in output.hidden.split(rows)]
    else:
        outputs = [layer(x, mask, case.domain(rank)) for rank, (x, mask, _) in enumerate(batches)]
    losses = [loss_of(output, weights) for output, (_, _, weights) in zip(outputs, batches)]
    (sum(losses) / world_size).backward()
    return [
        Result(
            output.hidden.detach(),
            torch.stack([output.balance_loss, output.z_loss]).detach(),
            x.grad * world_size,  # a rank's own x enters its own loss alone, which is not averaged
            gradients_of(layer),
            output.stats.expert_load,
            output.evidence,
        )
        for output, (x, _, _) in zip(outputs, batches)
    ]

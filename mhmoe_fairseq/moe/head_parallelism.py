"""Heads spread over processes, each with its router and its bank (Head Parallel, arXiv 2602.04870, section 4).

Every token's slices go to the processes of their heads *before* routing, and what the experts make of them comes back:
a token is sent once, whatever K is, equally much of it to every process. P is the number of processes, h = H / P the
heads of one of them, l = h d the width of a slice, M the tokens of all P together.

Every process has all routers and selection biases, of which it uses its heads'; its batch's losses and statistics are
put together from what the heads' processes say of it. ``mhmoe_fairseq.parallel`` transfers; here nothing knows about
processes.
"""

import dataclasses

import torch
from torch import Tensor

from ._fields import ConfigError
from .config import MHMoEConfig
from .dispatch import DispatchPlan, plan_dispatch
from .gate import Assignment
from .heads import merge_heads, repeat_mask, split_heads
from .losses import RouterSums, router_sums
from .parallelism import ExpertParallelism, Traffic
from .stats import RoutingStats, routing_stats


def of_one_process(config: MHMoEConfig, size: int) -> MHMoEConfig:
    """The layer that each of ``size`` processes applies to the slices of its heads.

    Raises:
        ConfigError: if heads have no banks of their own, or cannot be shared out evenly.

    >>> config = MHMoEConfig(embed_dim=8, num_heads=4, num_experts=3, expert_ffn_dim=16, expert_banks="per-head")
    >>> own = of_one_process(config, 2)
    >>> own.num_heads, own.subtoken_dim, own.total_experts
    (2, 2, 6)
    """
    if config.num_banks == 1:
        raise ConfigError("expert_banks", config.expert_banks, "must be 'per-head' for heads to be shared out")
    if config.num_heads % size:
        raise ConfigError(
            "num_heads", config.num_heads, f"must be a multiple of {size}, the processes that share heads"
        )
    width, heads = config.inner_dim // size, config.num_heads // size
    return dataclasses.replace(config, num_heads=heads, embed_dim=width, latent_dim=None, merge_norm=False)


@dataclasses.dataclass
class HeadSlices:
    """The slices of this process's heads of all processes' tokens.

    Attributes:
        own: the layer on these heads.
        x_Nd: their sub-tokens, those of one process after the other's, ``(M h, d)``.
        mask_N: True where padded.
        sent: how many tokens went to each process.
        received: how many came from each.

    >>> config = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=3, expert_ffn_dim=16, expert_banks="per-head")
    >>> HeadSlices(config, torch.zeros(6, 4), torch.zeros(6, dtype=torch.bool), [1, 1], [1, 2]).rows_by_source
    [2, 4]
    """

    own: MHMoEConfig
    x_Nd: Tensor
    mask_N: Tensor
    sent: list[int]
    received: list[int]

    @property
    def rows_by_source(self) -> list[int]:
        """How many sub-tokens are of each process's tokens."""
        return [tokens * self.own.num_heads for tokens in self.received]


def send_slices(
    parallel: ExpertParallelism, own: MHMoEConfig, x_TL: Tensor, mask_T: Tensor | None
) -> tuple[HeadSlices, Traffic]:
    """Send each process its heads' slices of ``(T, L)``, and get those of all, and what was sent.

    >>> from types import SimpleNamespace
    >>> alone = SimpleNamespace(size=1, rank=0, exchange_counts=lambda load: ([2], [2], load),
    ...     transfer=lambda rows, sent, received: rows)  # a "process" that has all heads itself
    >>> config = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=3, expert_ffn_dim=16, expert_banks="per-head")
    >>> slices, traffic = send_slices(alone, config, torch.randn(2, 8), None)
    >>> slices.x_Nd.shape, traffic
    (torch.Size([4, 4]), Traffic(rows=2, bytes=0))
    """
    tokens, size = x_TL.size(0), parallel.size
    sent, received, _ = parallel.exchange_counts(torch.full((size,), tokens, device=x_TL.device))
    x_Sl = x_TL.view(tokens, size, own.inner_dim).transpose(0, 1).reshape(-1, own.inner_dim)
    x_Ml = parallel.transfer(x_Sl, sent, received)
    # Always sent: another process may have padding where this one has none.
    mask_T1 = x_TL.new_zeros(tokens, 1, dtype=torch.uint8) if mask_T is None else mask_T.view(-1, 1).to(torch.uint8)
    mask_M = parallel.transfer(mask_T1.repeat(size, 1), sent, received).bool().flatten()
    slices = HeadSlices(own, split_heads(x_Ml, own.num_heads), repeat_mask(mask_M, own.num_heads), sent, received)
    return slices, Traffic(len(x_Sl), (size - 1) * tokens * x_Sl.size(1) * x_Sl.element_size())


def return_slices(parallel: ExpertParallelism, slices: HeadSlices, y_Nd: Tensor) -> Tensor:
    """Send what the experts made of ``slices`` back: the sub-tokens of this process's own tokens, ``(T H, d)``.

    >>> from types import SimpleNamespace
    >>> alone = SimpleNamespace(size=1, transfer=lambda rows, sent, received: rows)
    >>> config = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=3, expert_ffn_dim=16, expert_banks="per-head")
    >>> slices = HeadSlices(config, torch.randn(4, 4), torch.zeros(4, dtype=torch.bool), [2], [2])
    >>> torch.equal(return_slices(alone, slices, slices.x_Nd), slices.x_Nd)
    True
    """
    y_Ml = merge_heads(y_Nd, slices.own.num_heads)
    y_Sl = parallel.transfer(y_Ml, slices.received, slices.sent)
    by_token = y_Sl.view(parallel.size, -1, y_Sl.size(1)).transpose(0, 1)
    return by_token.reshape(-1, y_Nd.size(1))


def plan_pieces(assignments: list[Assignment], own: MHMoEConfig) -> tuple[DispatchPlan, Tensor, Tensor | None]:
    """One dispatch of all processes' sub-tokens, their gate weights, and what balancing counted of them all.

    >>> config = MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=16, top_k=1)
    >>> plan, gates_NK, evidence = plan_pieces([Gate(config)(torch.eye(2)), Gate(config)(torch.eye(2))], config)
    >>> plan.load(), gates_NK.shape, evidence
    (tensor([2, 2], dtype=torch.int32), torch.Size([4, 1]), None)
    """
    experts_NK = torch.cat([assignment.experts_NK for assignment in assignments])
    gates_NK = torch.cat([assignment.gates_NK for assignment in assignments])
    counted = [assignment.evidence for assignment in assignments if assignment.evidence is not None]
    evidence = torch.stack(counted).sum(0) if counted else None
    return plan_dispatch(experts_NK, own.total_experts, all_real=False), gates_NK, evidence


def tell_sources(
    parallel: ExpertParallelism, own: MHMoEConfig, routed: list[tuple[Tensor, Assignment, Tensor]]
) -> tuple[RouterSums, RoutingStats]:
    """Tell each process what this one's heads did with its tokens, and put together what all heads did with its own.

    Args:
        routed: of each process's sub-tokens the logits, the assignment, and the padding mask.

    >>> from types import SimpleNamespace
    >>> alone = SimpleNamespace(size=1, transfer=lambda rows, sent, received: rows)
    >>> config, logits = MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=16, top_k=1), torch.eye(2)
    >>> sums, stats = tell_sources(alone, config, [(logits, Gate(config)(logits), torch.tensor([False, True]))])
    >>> sums.chosen_E, stats.num_subtokens
    (tensor([1., 0.]), tensor(1.))
    """
    told = parallel.transfer(
        torch.stack([_message(own, *piece) for piece in routed]), [1] * parallel.size, [1] * parallel.size
    )
    chosen, probs, load, rest = told.split([own.total_experts] * 3 + [4], dim=1)
    z, num_real, dropped, entropy = rest.sum(0).unbind()
    counts = (load.flatten(), dropped, entropy, num_real)
    return RouterSums(chosen.flatten(), probs.flatten(), z, num_real), RoutingStats(
        *(c.detach().float() for c in counts)
    )


def _message(own: MHMoEConfig, logits_NE: Tensor, assignment: Assignment, mask_N: Tensor) -> Tensor:
    sums = router_sums(logits_NE, assignment, mask_N, count=own.balance_assignment, banks=own.num_banks)
    plan = plan_dispatch(assignment.experts_NK, own.total_experts, all_real=False)
    stats = routing_stats(assignment, plan, mask_N)
    numbers = torch.stack([sums.z, sums.num_real, stats.dropped.to(sums.z), stats.entropy.to(sums.z)])
    return torch.cat([sums.chosen_E, sums.probs_E, stats.expert_load.to(sums.z), numbers])

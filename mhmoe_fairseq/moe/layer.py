"""The Multi-Head Mixture-of-Experts layer (Wu et al., NeurIPS 2024)."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._fields import ConfigError
from .banks import HeadRouters, build_router
from .config import LayerCounts, MHMoEConfig
from .dispatch import plan_dispatch
from .experts import ExpertFFN, SharedExpert
from .gate import GATES
from .head_parallelism import of_one_process, plan_pieces, return_slices, send_slices, tell_sources
from .heads import MergeNorm, Projection, merge_heads, repeat_mask, split_heads
from .losses import RouterSums, load_balancing_loss, router_sums, router_z_loss
from .parallelism import ExpertParallelism, Traffic
from .stats import RoutingStats, routing_stats


class MHMoEOutput(NamedTuple):
    """What the layer returns.

    Attributes:
        hidden: ``(..., D)``, the shape of the input.
        balance_loss: scalar, unweighted (P1 equation 10).
        z_loss: scalar, unweighted.
        stats: detached routing counts.
        traffic: what this process sent to the experts; None while all of them are here.
        evidence: what the gate's balancing counted in training beside the loads; None for nothing.

    >>> output = MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))(torch.randn(2, 3, 8))
    >>> output.hidden.shape, output.stats.expert_load.sum(), output.without_hidden().hidden.shape
    (torch.Size([2, 3, 8]), tensor(12.), torch.Size([0]))
    """

    hidden: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    stats: RoutingStats
    traffic: Traffic | None = None
    evidence: Tensor | None = None

    def without_hidden(self) -> "MHMoEOutput":
        """The same with an empty ``hidden``, so that a list over many layers holds no activations."""
        return self._replace(hidden=self.hidden.new_empty(0))


class ExpertLayer(nn.Module):
    """What every layer of experts has.

    Attributes:
        tells_padding: True, see :func:`taken_for_padding`.

    >>> ExpertLayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16)).counts().params
    1312
    """

    tells_padding = True

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.config = config

    def reset_parameters(self) -> None:
        """Initial values for all parameters, as for a layer built on the meta device and given memory.

        Every module with parameters of its own has this method, so that a sharded model can call it module by module.
        """
        for module in self.modules():
            reset = None if module is self else getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def counts(self) -> LayerCounts:
        """Parameters and FLOPs of the whole layer, experts on other processes included."""
        return self.config.counts()


class MHMoELayer(ExpertLayer):
    """Split every token into H sub-tokens, route each to K of E experts, merge the results.

    The forward pass:
      1. head projection ``D -> L``, split into H sub-tokens of d = L/H;
      2. router: one logit per sub-token and expert, of its head's bank where each has its own;
      3. top-k experts and gate weights; with ``routing="capacity"`` the overflow is dropped;
      4. sort by expert, expert FFNs, weighted sum back in sub-token order;
      5. optionally the sub-token itself (P1 equation 6) and a shared expert's output (P2);
      6. merge, optionally a norm, merge projection, dropout.

    Args:
        backend: how the experts compute: ``"auto"`` (by device, dtype and shape), ``"loop"``, ``"grouped"`` or
            ``"blocked"``; see :mod:`.experts`.
        parallel: the processes over which experts, and with ``balance_scope="global"`` losses, extend; None for one.

    >>> layer = MHMoELayer(MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, expert_ffn_dim=16))
    >>> layer(torch.randn(2, 3, 8), padding_mask=torch.tensor([[False] * 3, [False, True, True]])).stats.num_subtokens
    tensor(8.)
    >>> layer.counts().params == sum(parameter.numel() for parameter in layer.parameters())
    True
    """

    def __init__(
        self, config: MHMoEConfig, *, backend: str = "auto", parallel: ExpertParallelism | None = None
    ) -> None:
        super().__init__(config)
        self.parallel = parallel
        self.head_projection, self.merge_projection = None, None
        widths, bias, gain = config.head_widths, config.projection_bias, config.projection_gain
        if config.has_head_projection:
            self.head_projection = Projection(widths, bias=bias, gain=gain / math.sqrt(2), zero_bias=False)
        self.router = build_router(config)
        self.routes_slices = parallel is not None and parallel.size > 1 and parallel.by == "heads"
        if self.routes_slices and config.balance_scope == "sequence":
            raise ConfigError("balance_scope", "sequence", "needs all heads of a sequence in one process")
        # What this process routes for: the layer, or where heads are shared out, one of its own heads alone.
        self.own = of_one_process(config, parallel.size) if parallel is not None and self.routes_slices else config
        self.gate = GATES[config.routing](self.own)
        if parallel is not None and self.routes_slices and self.gate.balancing is not None:
            self.gate.balancing.extend(config, first=parallel.rank * self.own.num_banks)
        self.experts = ExpertFFN(config, backend=backend, parallel=parallel)
        if config.has_merge_projection:
            self.merge_projection = Projection(widths[::-1], bias=bias, gain=gain, zero_bias=True)
        self.merge_norm = MergeNorm(config.inner_dim) if config.merge_norm else None
        self.shared_expert = SharedExpert(config) if config.shared_expert_dim else None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, domain: Tensor | None = None) -> MHMoEOutput:
        """Apply the layer; ``ValueError`` if the shapes do not fit.

        Args:
            x: ``(..., D)``.
            padding_mask: bool ``(...)``, True where padded. Padded tokens are never routed, count in no loss and use
                no capacity; their output does not depend on their input.
            domain: int64 ``(...)``, each token's expert, for ``router="domain"`` and no other.
        """
        if x.size(-1) != self.config.embed_dim:
            raise ValueError(f"x has {x.size(-1)} features; embed_dim is {self.config.embed_dim}")
        if padding_mask is not None and padding_mask.shape != x.shape[:-1]:
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}; x has {tuple(x.shape[:-1])}")
        if domain is not None and domain.shape != x.shape[:-1]:
            raise ValueError(f"domain has shape {tuple(domain.shape)}; x has {tuple(x.shape[:-1])}")
        x_TD = x.reshape(-1, x.size(-1))
        mask_N = None
        domain_N = None if domain is None else domain.reshape(-1)
        if padding_mask is not None:
            mask_T = padding_mask.reshape(-1).bool()
            x_TD = x_TD.masked_fill(mask_T.unsqueeze(1), 0)  # 0 * NaN is NaN: never multiply by the mask
            mask_N = repeat_mask(mask_T, self.config.subtokens_per_token)

        heads_TD = x_TD if self.head_projection is None else self.head_projection(x_TD)
        x_Nd = split_heads(heads_TD, self.config.subtokens_per_token)
        if self.routes_slices:
            output = self._route_slices(heads_TD, None if padding_mask is None else mask_T)
        else:
            routed = x_TD if self.config.router_input == "token" else x_Nd
            sequences = max(x.shape[:-2].numel(), 1) if self.config.balance_scope == "sequence" else None
            output = self._route(x_Nd, self.router(routed, domain_N), mask_N, sequences)
        y_Nd = output.hidden
        if self.config.subtoken_residual:
            y_Nd = y_Nd + x_Nd
        y_TD = merge_heads(y_Nd, self.config.subtokens_per_token)
        if self.merge_norm is not None:
            y_TD = self.merge_norm(y_TD)
        if self.merge_projection is not None:
            y_TD = self.merge_projection(y_TD)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        y_TD = F.dropout(y_TD, self.config.dropout, self.training)
        return output._replace(hidden=y_TD.view(x.shape))

    def _route(self, x_Nd: Tensor, logits_NE: Tensor, mask_N: Tensor | None, sequences: int | None) -> MHMoEOutput:
        """Steps 3 and 4, ``hidden`` being ``(N, d)``."""
        config = self.config
        assignment = self.gate(logits_NE, mask_N)
        plan = plan_dispatch(assignment.experts_NK, config.total_experts, all_real=assignment.kept_NK is None)
        y_Nd, traffic = self.experts(x_Nd, assignment.gates_NK, plan)

        count, banks = config.balance_assignment, config.num_banks
        sums = router_sums(logits_NE, assignment, mask_N, count=count, banks=banks, sequences=sequences)
        stats = routing_stats(assignment, plan, mask_N)
        return self._output(y_Nd, sums, stats, traffic)._replace(evidence=assignment.evidence)

    def _route_slices(self, x_TL: Tensor, mask_T: Tensor | None) -> MHMoEOutput:
        """Steps 2 to 4 by the processes of the heads, each process's sub-tokens routed as its own layer would."""
        parallel, own = self.parallel, self.own
        assert parallel is not None and isinstance(self.router, HeadRouters)
        heads = range(parallel.rank * own.num_heads, (parallel.rank + 1) * own.num_heads)
        slices, traffic = send_slices(parallel, own, x_TL, mask_T)
        routed = []
        for x_Nd, mask_N in zip(slices.x_Nd.split(slices.rows_by_source), slices.mask_N.split(slices.rows_by_source)):
            logits_NE = self.router.of_heads(heads, x_Nd)
            routed.append((logits_NE, self.gate(logits_NE, mask_N), mask_N))
        plan, gates_NK, evidence = plan_pieces([assignment for _, assignment, _ in routed], own)
        y_Nd, _ = self.experts(slices.x_Nd, gates_NK, plan)
        output = self._output(return_slices(parallel, slices, y_Nd), *tell_sources(parallel, own, routed), traffic)
        return output._replace(evidence=evidence)

    def _output(self, y_Nd: Tensor, sums: RouterSums, stats: RoutingStats, traffic: Traffic | None) -> MHMoEOutput:
        if self.parallel is not None and self.config.balance_scope == "global":
            sums = sums.over(self.parallel.sum)
        needs_balance = self.router.learns and not self.gate.is_balanced
        balance_loss = load_balancing_loss(sums) if needs_balance else sums.num_real.new_zeros(())
        return MHMoEOutput(y_Nd, balance_loss, router_z_loss(sums), stats, traffic)

    @property
    def drops_tokens(self) -> bool:
        """Whether experts may refuse tokens, so that a token's output depends on the others of its batch."""
        return self.gate.drops_tokens

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        c = self.config
        experts, width = c.experts_in_words, c.expert_ffn_dim
        sizes = f"heads={c.num_heads}, experts={experts}, top_k={c.top_k}, expert_ffn_dim={width}"
        return f"{sizes}, routing={c.routing}, params={c.num_params():,}"


@contextlib.contextmanager
def taken_for_padding(model: nn.Module, applies: bool = True) -> Iterator[None]:
    """While open, every module of ``model`` that tells padding from tokens takes all of its input for padding.

    For calls that are made only because other processes wait for them: no row is routed, and none enters a balance
    loss, a load or a running mean, whether of this process or of all; the processes' transfers take place as ever.

    Args:
        model: whose modules with a true ``tells_padding`` are called as ``(x, padding_mask)``, with ``x (..., D)``
            and the mask, bool, of its leading dimensions.
        applies: False to change nothing.

    >>> layer = MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))
    >>> with taken_for_padding(layer):
    ...     layer(torch.randn(2, 8)).stats.num_subtokens
    tensor(0.)
    """
    modules = [module for module in model.modules() if getattr(module, "tells_padding", False)] if applies else []
    hooks = [module.register_forward_pre_hook(_all_padded, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _all_padded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    x: Tensor = args[0]
    others = {name: value for name, value in kwargs.items() if name != "padding_mask"}
    return (x, x.new_ones(x.shape[:-1], dtype=torch.bool), *args[2:]), others

"""The layer's configuration: validated at construction, able to count itself.

Letters used in names and shape comments throughout ``moe/``:
B batch, S sequence, T = B*S tokens, D model dim, H heads, d = D/H sub-token dim,
N = T*H sub-tokens, E experts, K top-k, R = N*K routed rows, C capacity, F expert hidden; L = H*d, the layer's inner
width, which is D unless ``latent_dim`` says otherwise.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from ..common.ranges import SIZE
from ._fields import ConfigError, Count, Positive, Rate, Size, check_fields, declared_choices, require_fields
from .activations import ACTIVATIONS
from .gate import GATES, GateFields
from .router import ROUTERS, RouterFields


@dataclass(frozen=True, kw_only=True)
class MHMoEConfig(RouterFields, GateFields):
    """Everything that decides what an MH-MoE layer computes.

    ``num_heads=1`` (with the projections at their default) is a plain sparse MoE layer:
    the X-MoE or SMoE baseline, through the same code.

    Args:
        embed_dim: model dimension D.
        num_heads: MH-MoE heads H, the number of sub-tokens each token is split into.
        latent_dim: inner width L between the projections, so that d = L / H; None for D. With one head and
            ``router_input="token"`` it makes the layer a LatentMoE (arXiv 2601.18089).
        expert_banks: ``"shared"``, one router and E experts for all heads; or ``"per-head"``, a router and a bank of E
            experts, ``num_experts``, for each (Multi-Head LatentMoE, arXiv 2602.04870). Expert e of head h is the
            layer's expert h*E + e.
        router_input: what the router sees: the ``"subtoken"``, or with one sub-token per token the ``"token"``, before
            the head projection.
        expert_ffn_dim: inner width F of one expert.
        activation: a name in ``ACTIVATIONS``; ``"swiglu"`` and ``"swiglu7"`` are gated, with three matrices per expert.
        expert_layernorm: LayerNorm on the inner activation (TorchScale's sub-LN).
        activation_dropout: dropout on the inner activation.
        dropout: dropout on the layer's output, applied once.
        head_projection, merge_projection: linear maps before the split and after the merge;
            None means "present when ``num_heads > 1`` or with a ``latent_dim``".
        merge_norm: RMSNorm of the merged sub-tokens, in front of the merge projection (Stable LatentMoE, Kimi K3).
        num_projection_layers: layers in each projection, ReLU between them (P1 table 7).
        projection_gain: of both projections' initial weights, which TorchScale does not rescale as it does experts'.
        split: False keeps whole tokens (P1 table 6, "without token splitting"); the experts
            then work on D dimensions and ``num_heads`` only decides the projections' default.
        subtoken_residual: add the sub-token to the experts' sum (P1 equation 6).
        shared_expert_dim: inner width of one always-active expert on whole tokens (P2 table 2);
            0 for none.
        quantize_experts: ternary matrices and inputs of eight bits in all experts, the shared one too (P2 table 3;
            see :mod:`.quantize`). Projections and router stay as they are.
        balance_assignment: count first choices (``"top1"``, GShard) or all choices (``"topk"``), or add up their gate
            weights (``"gates"``, Branch-Train-MiX), through which the loss then has a gradient, too.
        balance_scope: the auxiliary losses of each process's own batch (``"rank"``) or, under data parallelism, of all
            processes' batches together (``"global"``), as one process would see them in one batch; or the balance loss
            of each ``"sequence"``, the second last dimension of the input, by itself, and the mean of these.

    >>> config = MHMoEConfig(embed_dim=64, num_heads=4, num_experts=8, expert_ffn_dim=256, router="linear")
    >>> config.subtoken_dim, config.num_params(), config.flops_per_token()
    (16, 76160, 148480)
    >>> one_head = MHMoEConfig(embed_dim=64, num_experts=8, expert_ffn_dim=256)
    >>> MHMoEConfig.matching(one_head, budget="params", num_heads=4, multiple_of=1).expert_ffn_dim
    973
    """

    embed_dim: Size
    expert_ffn_dim: Size
    num_heads: Size = 1
    latent_dim: Annotated[int | None, SIZE] = None
    expert_banks: Literal["shared", "per-head"] = "shared"
    router_input: Literal["subtoken", "token"] = "subtoken"
    activation: Annotated[str, ACTIVATIONS] = "gelu"
    expert_bias: bool = True
    expert_layernorm: bool = False
    activation_dropout: Rate = 0.0
    dropout: Rate = 0.0
    head_projection: bool | None = None
    merge_projection: bool | None = None
    merge_norm: bool = False
    num_projection_layers: Count = 1
    projection_bias: bool = True
    projection_gain: Positive = 1.0
    split: bool = True
    subtoken_residual: bool = False
    shared_expert_dim: Count = 0
    quantize_experts: bool = False
    balance_assignment: Literal["top1", "topk", "gates"] = "top1"
    balance_scope: Literal["rank", "global", "sequence"] = "rank"

    def __post_init__(self) -> None:
        check_fields(self)
        ROUTERS[self.router].check(self)
        self.check_gate()
        if ROUTERS[self.router].is_fixed:
            rule = f"needs a router whose choices are learnt; {{router}} is {self.router!r}"
            require_fields(self, {"balancing": "none", "expert_groups": 1}, rule)
        if self.inner_dim % self.num_heads:
            width = "embed_dim" if self.latent_dim is None else "latent_dim"
            raise ConfigError("num_heads", self.num_heads, f"must divide {{{width}}} ({self.inner_dim})")
        if self.num_projection_layers == 0 and (self.head_projection or self.merge_projection):
            raise ConfigError("num_projection_layers", 0, "is 0, but a projection is switched on")
        if self.inner_dim != self.embed_dim and not (self.has_head_projection and self.has_merge_projection):
            needed = "{head_projection} and {merge_projection}"
            rule = f"differs from {{embed_dim}} ({self.embed_dim}), which needs {needed}"
            raise ConfigError("latent_dim", self.latent_dim, rule)
        if self.balance_scope == "sequence" and self.routing in GATES and GATES[self.routing].chooses_all:
            rule = f"counts a sub-token's K choices; with {{routing}} {self.routing} it has no such choice"
            raise ConfigError("balance_scope", self.balance_scope, rule)
        if self.merge_norm and not self.has_merge_projection:
            raise ConfigError("merge_norm", True, "needs {merge_projection}, in front of which it stands")
        if self.router_input == "token" and self.subtokens_per_token > 1:
            rule = f"needs one sub-token per token; {{num_heads}} is {self.num_heads}"
            raise ConfigError("router_input", self.router_input, rule)
        if self.expert_banks == "per-head" and self.num_heads > self.subtokens_per_token:
            raise ConfigError("expert_banks", self.expert_banks, "needs sub-tokens; {split} is switched off")

    @property
    def has_head_projection(self) -> bool:
        """Whether a projection stands before the split."""
        return self._has_projection(self.head_projection)

    @property
    def has_merge_projection(self) -> bool:
        """Whether a projection stands after the merge."""
        return self._has_projection(self.merge_projection)

    def _has_projection(self, switch: bool | None) -> bool:
        wanted = self.num_heads > 1 or self.latent_dim is not None if switch is None else switch
        return wanted and self.num_projection_layers > 0

    @property
    def subtokens_per_token(self) -> int:
        """H, or 1 without splitting."""
        return self.num_heads if self.split else 1

    @property
    def inner_dim(self) -> int:
        """Width L between the projections."""
        return self.latent_dim or self.embed_dim

    @property
    def subtoken_dim(self) -> int:
        """Width of what an expert sees: d = L / H, or L without splitting."""
        return self.inner_dim // self.subtokens_per_token

    @property
    def router_input_dim(self) -> int:
        """Width of what a router sees."""
        return self.embed_dim if self.router_input == "token" else self.subtoken_dim

    @property
    def num_banks(self) -> int:
        """Banks of experts, each with a router: H or 1."""
        return self.num_heads if self.expert_banks == "per-head" else 1

    @property
    def head_widths(self) -> list[int]:
        """Widths in front of, between and behind the head projection's maps; the merge projection's are the reverse."""
        return [self.embed_dim] + [self.inner_dim] * self.num_projection_layers

    @property
    def matrices_per_expert(self) -> int:
        """m in paper 2's budget rule: 3 with a gate, else 2."""
        return 2 + ACTIVATIONS[self.activation].is_gated

    def num_expert_params(self) -> int:
        """Parameters of one routed expert."""
        layernorm = 2 * self.expert_ffn_dim if self.expert_layernorm else 0
        return self._num_network_params(self.subtoken_dim, self.expert_ffn_dim) + layernorm

    def num_router_params(self) -> int:
        """Parameters of the router, or of all heads' routers."""
        return self.num_banks * ROUTERS[self.router].num_params(self)

    def num_projection_params(self) -> int:
        """Parameters of the head and merge projections together, and of the norm between."""
        biases = sum(width for _, width in self._projection_maps()) if self.projection_bias else 0
        return self._num_projection_weights() + biases + self.inner_dim * self.merge_norm

    def num_shared_expert_params(self) -> int:
        """Parameters of the shared expert (P2)."""
        return self._num_network_params(self.embed_dim, self.shared_expert_dim) if self.shared_expert_dim else 0

    def _num_network_params(self, d: int, f: int) -> int:
        biases = (self.matrices_per_expert - 1) * f + d if self.expert_bias else 0
        return self.matrices_per_expert * d * f + biases

    def num_params(self) -> int:
        """All parameters of the layer."""
        return self._num_always_active() + self.total_experts * self.num_expert_params()

    def num_active_params(self) -> int:
        """Parameters one sub-token uses: projections, router, shared expert and K experts.

        Where every head has a bank of its own, those that a token uses: all routers, and K experts of each bank.
        """
        return self._num_always_active() + self.num_banks * self.top_k * self.num_expert_params()

    def _num_always_active(self) -> int:
        return self.num_projection_params() + self.num_router_params() + self.num_shared_expert_params()

    def counts(self) -> "LayerCounts":
        """All counts together."""
        experts = self.total_experts * self.num_expert_params()
        return LayerCounts(self.num_params(), experts, self.num_active_params(), self.flops_per_token())

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward pass, matrix products only (2 per multiply-add), H*K expert calls."""
        h = self.subtokens_per_token
        calls = h * GATES[self.routing].mean_choices(self)
        experts = round(calls * self.matrices_per_expert * self.subtoken_dim * self.expert_ffn_dim)
        router = h * ROUTERS[self.router].flops(self)
        projections = self._num_projection_weights()
        shared = self.matrices_per_expert * self.embed_dim * self.shared_expert_dim
        return 2 * (experts + projections + shared) + router

    def _projection_maps(self) -> list[tuple[int, int]]:
        """Widths of input and output of every map of both projections."""
        head = list(itertools.pairwise(self.head_widths))
        merge = list(itertools.pairwise(reversed(self.head_widths)))
        return head * self.has_head_projection + merge * self.has_merge_projection

    def projection_inputs(self) -> int:
        """Features of one token that go into the maps of both projections."""
        return sum(width for width, _ in self._projection_maps())

    def _num_projection_weights(self) -> int:
        return sum(width_in * width_out for width_in, width_out in self._projection_maps())

    @classmethod
    def matching(
        cls,
        reference: "MHMoEConfig",
        *,
        budget: Literal["params", "flops"],
        num_heads: int,
        top_k: int | None = None,
        num_projection_layers: int = 1,
        multiple_of: int = 8,
        expert_multiple: int = 1,
        **changes: Any,
    ) -> "MHMoEConfig":
        """An MH-MoE configuration that spends what ``reference`` spends.

        Args:
            reference: the layer to match, usually ``num_heads=1`` without projections.
            budget: ``"params"`` (paper 1's beta): same E and k, the widest expert whose layer has at most
                the reference's parameters. ``"flops"`` (paper 2): expert width from equal FLOPs, then the
                number of experts from equal parameters.
            top_k: the reference's by default.
            multiple_of: the expert width is a multiple of this.
            expert_multiple: under ``"flops"`` the number of experts is a multiple of this.
            **changes: further fields to change.

        Raises:
            ConfigError: if no width fits the budget (``params``: within 0.5 % below).

        Source: P1 table 11 and appendix D; P2's parity rule in its general form. ``budget_gap`` tells what
        rounding leaves.
        """
        for name, multiple in (("multiple_of", multiple_of), ("expert_multiple", expert_multiple)):
            problem = SIZE.problem(multiple)
            if problem is not None:
                raise ConfigError(name, multiple, problem)
        changes |= {"num_projection_layers": num_projection_layers} | ({} if top_k is None else {"top_k": top_k})
        base = dataclasses.replace(reference, num_heads=num_heads, **changes)
        if budget == "params":
            return _match_params(base, reference, multiple_of)
        if budget == "flops":
            return _match_flops(base, reference, multiple_of, expert_multiple)
        raise ConfigError("budget", budget, "must be one of params, flops")

    def finer(self, times: int) -> "MHMoEConfig":
        """This layer with experts ``times`` as narrow, as many, and as many of them for each sub-token.

        The same products and weights of experts; only their output biases and the router grow. With one head it is
        fine-grained MoE; paper 2 takes ``times`` as the number of heads.

        Raises:
            ConfigError: if ``times`` does not divide the experts' width.
        """
        if self.expert_ffn_dim % times:
            raise ConfigError("granularity", times, f"must divide {{expert_ffn_dim}} ({self.expert_ffn_dim})")
        width, number, top_k = self.expert_ffn_dim // times, self.num_experts * times, self.top_k * times
        return dataclasses.replace(self, expert_ffn_dim=width, num_experts=number, top_k=top_k)

    def sharing(self, experts: int) -> "MHMoEConfig":
        """This layer with so many of its experts shared: every token passes them, and is routed to as many fewer.

        The same matrices and products: shared experts of width F are one of width ``experts`` F, and weigh 1. Applied
        to :meth:`finer` it is DeepSeekMoE (equations 6 to 11).

        Raises:
            ConfigError: if experts see parts of tokens, if no choice is left, or if a shared expert is there already.
        """
        if not experts:
            return self
        if self.subtoken_dim != self.embed_dim:
            rule = f"needs {{num_heads}} 1, not {self.num_heads}, and no {{latent_dim}}: it sees whole tokens"
            raise ConfigError("shared_experts", experts, rule)
        if experts >= self.top_k:
            raise ConfigError("shared_experts", experts, f"must be less than the experts of a token ({self.top_k})")
        if self.shared_expert_dim:
            raise ConfigError("shared_experts", experts, "contradicts {shared_expert_dim}: give one")
        number, top_k = self.num_experts - experts, self.top_k - experts
        width = experts * self.expert_ffn_dim
        return dataclasses.replace(self, num_experts=number, top_k=top_k, shared_expert_dim=width)

    def budget_gap(self, reference: "MHMoEConfig") -> "BudgetGap":
        """How far this layer is from ``reference``: relative gaps, positive where this one is larger."""
        return BudgetGap(
            params=self.num_params() / reference.num_params() - 1,
            flops=self.flops_per_token() / reference.flops_per_token() - 1,
        )


class LayerCounts(NamedTuple):
    """Parameters: all, those of all routed experts, those that one sub-token uses; and ``MHMoEConfig.flops_per_token``.

    >>> MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16, router="linear").counts()
    LayerCounts(params=1152, expert_params=1120, active_params=592, flops_per_token=1088)
    """

    params: int
    expert_params: int
    active_params: int
    flops_per_token: int


@dataclass(frozen=True)
class BudgetGap:
    """Relative differences in parameters and in FLOPs per token from a reference layer.

    >>> config = MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16)
    >>> config.budget_gap(config)
    BudgetGap(params=0.0, flops=0.0)
    """

    params: float
    flops: float


def _match_params(base: MHMoEConfig, reference: MHMoEConfig, multiple_of: int) -> MHMoEConfig:
    target = reference.num_params()

    def with_width(width: int) -> MHMoEConfig:
        return dataclasses.replace(base, expert_ffn_dim=width)

    fixed = with_width(1).num_params()
    per_unit = with_width(2).num_params() - fixed  # the count is linear in the width
    width = (1 + (target - fixed) // per_unit) // multiple_of * multiple_of
    if width < 1 or with_width(width).num_params() < 0.995 * target:
        raise ConfigError(
            "budget",
            "params",
            f"finds no {{expert_ffn_dim}} that is a multiple of {multiple_of} and gives between 99.5 % and 100 % of "
            f"the reference's {target:,} parameters with {{num_heads}}={base.num_heads}, {{num_experts}}="
            f"{base.num_experts}; lower multiple_of or take a larger reference",
        )
    return with_width(width)


def _match_flops(base: MHMoEConfig, reference: MHMoEConfig, multiple_of: int, expert_multiple: int) -> MHMoEConfig:
    # With W projection weights and B banks a token costs K0 m D F0 = W + H K m (L/H) F; the layer has
    # m D F0 E0 = W + B E m (L/H) F.
    m, projections = base.matrices_per_expert, base._num_projection_weights()
    reference_width = m * reference.inner_dim * reference.expert_ffn_dim
    width_exact = (reference.top_k * reference_width - projections) / (m * base.inner_dim * base.top_k)
    width = round(width_exact / multiple_of) * multiple_of
    if width < 1:
        raise ConfigError(
            "budget",
            "flops",
            "is spent: the projections alone cost more than the reference's experts ({expert_ffn_dim} would be "
            f"{width_exact:.1f}); take a wider reference or fewer projection layers",
        )
    available = reference_width * reference.total_experts - projections
    one_of_each = m * base.subtoken_dim * width * base.num_banks
    experts = round(available / one_of_each / expert_multiple) * expert_multiple
    return dataclasses.replace(base, expert_ffn_dim=width, num_experts=max(experts, base.top_k, expert_multiple))


def choices(field: str) -> tuple[str, ...]:
    """The values that a field of :class:`MHMoEConfig` may have, where it is a choice by name.

    >>> choices("activation"), choices("balance_scope")
    (('gelu', 'relu', 'swiglu', 'swiglu7'), ('rank', 'global', 'sequence'))
    """
    return declared_choices(MHMoEConfig, field)

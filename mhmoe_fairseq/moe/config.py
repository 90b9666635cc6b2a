"""The layer's configuration: validated at construction, able to count itself.

Letters used in names and shape comments throughout ``moe/``:
B batch, S sequence, T = B*S tokens, D model dim, H heads, d = D/H sub-token dim,
N = T*H sub-tokens, E experts, K top-k, R = N*K routed rows, C capacity, F expert hidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..common.ranges import ANY, BELOW_ONE, COUNT, POSITIVE, SIZE

ROUTERS = ("linear", "xmoe")
ROUTINGS = ("dropless", "capacity")
ACTIVATIONS = ("gelu", "relu", "swiglu")
NORMALIZE_SIDES = ("expert", "both")
BALANCE_ASSIGNMENTS = ("top1", "topk")
BALANCE_SCOPES = ("rank", "global")
SECOND_EXPERT_POLICIES = ("all", "sampling", "random")
_RANGES = {
    "embed_dim": SIZE,
    "num_heads": SIZE,
    "num_experts": SIZE,
    "top_k": SIZE,
    "expert_ffn_dim": SIZE,
    "router_dim": SIZE,
    "shared_expert_dim": COUNT,
    "num_projection_layers": COUNT,
    "dropout": BELOW_ONE,
    "activation_dropout": BELOW_ONE,
    "router_temperature": POSITIVE,
    "capacity_factor": POSITIVE,
    "eval_capacity_fraction": ANY,
}


@dataclass(frozen=True, kw_only=True)
class MHMoEConfig:
    """Everything that decides what an MH-MoE layer computes.

    ``num_heads=1`` (with the projections at their default) is a plain sparse MoE layer:
    the X-MoE or SMoE baseline, through the same code.

    Args:
        embed_dim: model dimension D.
        num_heads: MH-MoE heads H, the number of sub-tokens each token is split into.
        num_experts: experts E.
        top_k: experts per sub-token K.
        expert_ffn_dim: inner width F of one expert.
        router: ``"xmoe"`` (low-dimensional, normalised experts) or ``"linear"``.
        routing: ``"dropless"``, or ``"capacity"`` (the choices of GShard and TorchScale).
        activation: ``"gelu"``, ``"relu"`` or ``"swiglu"`` (three matrices per expert).
        expert_bias: whether the experts' linear maps have biases.
        expert_layernorm: LayerNorm on the inner activation (TorchScale's sub-LN).
        activation_dropout: dropout on the inner activation.
        dropout: dropout on the layer's output, applied once.
        head_projection, merge_projection: linear maps before the split and after the merge;
            None means "present when ``num_heads > 1``".
        num_projection_layers: layers in each projection, ReLU between them (P1 table 7).
        projection_bias: whether the projections have biases.
        split: False keeps whole tokens (P1 table 6, "without token splitting"); the experts
            then work on D dimensions and ``num_heads`` only decides the projections' default.
        subtoken_residual: add the sub-token to the experts' sum (P1 equation 6).
        shared_expert_dim: inner width of one always-active expert on whole tokens (P2 table 2);
            0 for none.
        router_dim: width of the X-MoE router's projection.
        router_normalize: ``"expert"`` (TorchScale) or ``"both"`` (a true cosine).
        router_temperature: initial value of a learnable temperature, or None for none.
        gating_fp32: run the router in float32 under mixed precision.
        normalize_gates: renormalise the gate weights over the selected experts when K >= 2.
        normalize_before_dropping: with capacity routing, renormalise before dropping.
        balance_assignment: count first choices (``"top1"``, GShard) or all choices (``"topk"``).
        balance_scope: the auxiliary losses of each process's own batch (``"rank"``) or, under data parallelism, of all
            processes' batches together (``"global"``), as one process would see them in one batch.
        second_expert_policy: GShard's policy for the second expert; training with K = 2 only.
        capacity_factor: training capacity = int(factor * K * ceil(N / E)) slots per expert.
        eval_capacity_fraction: evaluation capacity as a fraction of the sub-tokens; 0 or below: the training rule.
    """

    embed_dim: int
    num_experts: int
    expert_ffn_dim: int
    num_heads: int = 1
    top_k: int = 2
    router: Literal["linear", "xmoe"] = "xmoe"
    routing: Literal["dropless", "capacity"] = "dropless"
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    expert_bias: bool = True
    expert_layernorm: bool = False
    activation_dropout: float = 0.0
    dropout: float = 0.0
    head_projection: bool | None = None
    merge_projection: bool | None = None
    num_projection_layers: int = 1
    projection_bias: bool = True
    split: bool = True
    subtoken_residual: bool = False
    shared_expert_dim: int = 0
    router_dim: int = 16
    router_normalize: Literal["expert", "both"] = "expert"
    router_temperature: float | None = None
    gating_fp32: bool = True
    normalize_gates: bool = True
    normalize_before_dropping: bool = False
    balance_assignment: Literal["top1", "topk"] = "top1"
    balance_scope: Literal["rank", "global"] = "rank"
    second_expert_policy: Literal["all", "sampling", "random"] = "all"
    capacity_factor: float = 1.0
    eval_capacity_fraction: float = 0.25

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    # ------------------------------------------------------------------ validation

    def _fail(self, field: str, rule: str) -> None:
        raise ValueError(f"MHMoEConfig.{field} ({getattr(self, field)!r}) {rule}")

    def _check_choices(self) -> None:
        for field, choices in (
            ("router", ROUTERS),
            ("routing", ROUTINGS),
            ("activation", ACTIVATIONS),
            ("router_normalize", NORMALIZE_SIDES),
            ("balance_assignment", BALANCE_ASSIGNMENTS),
            ("balance_scope", BALANCE_SCOPES),
            ("second_expert_policy", SECOND_EXPERT_POLICIES),
        ):
            if getattr(self, field) not in choices:
                self._fail(field, f"must be one of {', '.join(choices)}")

    def _check_numbers(self) -> None:
        for field, allowed in _RANGES.items():
            value = getattr(self, field)
            if value is None and field == "router_temperature":  # none at all
                continue
            problem = allowed.problem(value)
            if problem is not None:
                self._fail(field, problem)

    def _check_combinations(self) -> None:
        if self.embed_dim % self.num_heads:
            self._fail("num_heads", f"must divide embed_dim ({self.embed_dim})")
        if self.top_k > self.num_experts:
            self._fail("top_k", f"must be at most num_experts ({self.num_experts})")
        if self.second_expert_policy != "all" and self.top_k != 2:
            self._fail("second_expert_policy", f"needs top_k 2, not {self.top_k}")
        if self.router == "linear" and self.router_temperature is not None:
            self._fail("router_temperature", "needs the xmoe router; router is 'linear'")
        if self.router == "linear" and self.router_normalize != "expert":
            self._fail("router_normalize", "needs the xmoe router; router is 'linear'")
        if self.num_projection_layers == 0 and (self.head_projection or self.merge_projection):
            self._fail("num_projection_layers", "is 0, but a projection is switched on")

    # ------------------------------------------------------------------ derived sizes

    @property
    def has_head_projection(self) -> bool:
        """Whether a projection stands before the split."""
        return self._has_projection(self.head_projection)

    @property
    def has_merge_projection(self) -> bool:
        """Whether a projection stands after the merge."""
        return self._has_projection(self.merge_projection)

    def _has_projection(self, switch: bool | None) -> bool:
        wanted = self.num_heads > 1 if switch is None else switch
        return wanted and self.num_projection_layers > 0

    @property
    def split_heads(self) -> int:
        """Sub-tokens per token: H, or 1 without splitting."""
        return self.num_heads if self.split else 1

    @property
    def subtoken_dim(self) -> int:
        """Width of what an expert sees: d = D / H, or D without splitting."""
        return self.embed_dim // self.split_heads

    @property
    def matrices_per_expert(self) -> int:
        """m in paper 2's budget rule: 3 for SwiGLU, else 2."""
        return 3 if self.activation == "swiglu" else 2

    # ------------------------------------------------------------------ counting

    def num_expert_params(self) -> int:
        """Parameters of one routed expert."""
        d, f = self.subtoken_dim, self.expert_ffn_dim
        biases = (self.matrices_per_expert - 1) * f + d if self.expert_bias else 0
        layernorm = 2 * f if self.expert_layernorm else 0
        return self.matrices_per_expert * d * f + biases + layernorm

    def num_router_params(self) -> int:
        """Parameters of the router."""
        d, e, r = self.subtoken_dim, self.num_experts, self.router_dim
        if self.router == "linear":
            return d * e
        return d * r + e * r + (self.router_temperature is not None)

    def num_projection_params(self) -> int:
        """Parameters of the head and merge projections together."""
        layer = self.embed_dim**2 + (self.embed_dim if self.projection_bias else 0)
        return self._num_projection_matrices() * layer

    def num_shared_expert_params(self) -> int:
        """Parameters of the shared expert (P2)."""
        d, f, m = self.embed_dim, self.shared_expert_dim, self.matrices_per_expert
        if not f:
            return 0
        return m * d * f + ((m - 1) * f + d if self.expert_bias else 0)

    def num_params(self) -> int:
        """All parameters of the layer."""
        return self._num_always_active_params() + self.num_experts * self.num_expert_params()

    def num_active_params(self) -> int:
        """Parameters one sub-token uses: projections, router, shared expert and K experts."""
        return self._num_always_active_params() + self.top_k * self.num_expert_params()

    def flops_per_token(self) -> int:
        """FLOPs of one token's forward pass, matrix products only (2 per multiply-add), H*K expert calls."""
        d, e, h = self.subtoken_dim, self.num_experts, self.split_heads
        experts = h * self.top_k * self.matrices_per_expert * d * self.expert_ffn_dim
        router = h * (d * e if self.router == "linear" else d * self.router_dim + self.router_dim * e)
        projections = self._num_projection_matrices() * self.embed_dim**2
        shared = self.matrices_per_expert * self.embed_dim * self.shared_expert_dim
        return 2 * (experts + router + projections + shared)

    def _num_projection_matrices(self) -> int:
        return (self.has_head_projection + self.has_merge_projection) * self.num_projection_layers

    def _num_always_active_params(self) -> int:
        return self.num_projection_params() + self.num_router_params() + self.num_shared_expert_params()

    # ------------------------------------------------------------------ budgets

    @classmethod
    def matching(
        cls,
        reference: MHMoEConfig,
        *,
        budget: Literal["params", "flops"],
        num_heads: int,
        top_k: int | None = None,
        num_projection_layers: int = 1,
        multiple_of: int = 8,
        expert_multiple: int = 1,
        **changes: Any,
    ) -> MHMoEConfig:
        """An MH-MoE configuration that spends what ``reference`` spends.

        Args:
            reference: the layer to match, usually ``num_heads=1`` without projections.
            budget: ``"params"`` (paper 1's beta): same E and k, the widest expert whose layer has at most
                the reference's parameters. ``"flops"`` (paper 2): expert width from equal FLOPs, then the
                number of experts from equal parameters.
            num_heads: heads H of the result.
            top_k: experts per sub-token (default: the reference's).
            num_projection_layers: layers in each projection.
            multiple_of: the expert width is a multiple of this.
            expert_multiple: under ``"flops"`` the number of experts is a multiple of this.
            **changes: further fields to change, such as ``split=False``.

        Raises:
            ValueError: if no width fits the budget (``params``: within 0.5 % below).

        Source: P1 table 11 and appendix D; P2's parity rule in its general form. ``budget_gap`` tells what
        rounding leaves.
        """
        for name, multiple in (("multiple_of", multiple_of), ("expert_multiple", expert_multiple)):
            if SIZE.problem(multiple):
                raise ValueError(f"{name} ({multiple!r}) {SIZE.problem(multiple)}")
        base = dataclasses.replace(
            reference,
            num_heads=num_heads,
            top_k=reference.top_k if top_k is None else top_k,
            num_projection_layers=num_projection_layers,
            **changes,
        )
        if budget == "params":
            return _match_params(base, reference, multiple_of)
        if budget == "flops":
            return _match_flops(base, reference, multiple_of, expert_multiple)
        raise ValueError(f"budget ({budget!r}) must be one of params, flops")

    def budget_gap(self, reference: MHMoEConfig) -> BudgetGap:
        """How far this layer is from ``reference``: relative gaps, positive where this one is larger."""
        return BudgetGap(
            params=self.num_params() / reference.num_params() - 1,
            flops=self.flops_per_token() / reference.flops_per_token() - 1,
        )


@dataclass(frozen=True)
class BudgetGap:
    """Relative differences in parameters and in FLOPs per token from a reference layer."""

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
        raise ValueError(
            f"budget 'params': no expert_ffn_dim that is a multiple of {multiple_of} gives between 99.5 % and 100 % of "
            f"the reference's {target:,} parameters with num_heads={base.num_heads}, num_experts={base.num_experts}; "
            f"lower multiple_of or take a larger reference"
        )
    return with_width(width)


def _match_flops(base: MHMoEConfig, reference: MHMoEConfig, multiple_of: int, expert_multiple: int) -> MHMoEConfig:
    # One token: K0 m D F0 = P D^2 + H K m (D/H) F; the layer: m D F0 E0 = P D^2 + m (D/H) F E.
    d, m = base.embed_dim, base.matrices_per_expert
    projections = base._num_projection_matrices() * d
    width_exact = (reference.top_k * reference.expert_ffn_dim - projections / m) / base.top_k
    width = round(width_exact / multiple_of) * multiple_of
    if width < 1:
        raise ValueError(
            f"budget 'flops': the projections alone cost more than the reference's experts "
            f"(expert_ffn_dim would be {width_exact:.1f}); take a wider reference or fewer projection layers"
        )
    available = m * d * reference.expert_ffn_dim * reference.num_experts - projections * d
    experts = round(available / (m * base.subtoken_dim * width) / expert_multiple) * expert_multiple
    return dataclasses.replace(base, expert_ffn_dim=width, num_experts=max(experts, base.top_k, expert_multiple))

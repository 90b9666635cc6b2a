"""Experts on a CPU: a loop over contiguous slices of sorted rows, with a hand-written backward.

What is kept for the backward is the pre-activation alone, ``(R, F)``; plain autograd keeps the activation too and
holds the sorted input and the gradient of whole slices. The rest is recomputed in pieces small enough for the cache.

It computes in the dtype of its input. Weights of another, as under autocast, are cast expert by expert in either pass:
kept for the backward, the copies of all layers would be half as large as all gradients. Gradients are summed in the
weights' own dtype.

Values are read on the host and written to memory of its own, and the backward is no graph. So the loop cannot be
traced or transformed (:func:`eager_obstacle`), and where a gradient is to be differentiated again its backward computes
it anew in autograd's operations, with the same dropout. Quantised experts are computed in these operations at once: the
norm's scale and what the kernels fuse would have to be apart where the second map's input is rounded.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._expert_network import ExpertWeights, expert_network
from ..dispatch import DispatchPlan, combine
from ..modes import eager_obstacle, without_autocast
from . import memory as _cpu_memory
from .inner import FusedInner, InnerSettings, dropout_scale, inner_of
from .norm import NormedLinear, parameter_grads
from .rounding import Layout, lay_out, row_multiple

# Rows per piece, at most.
_PIECE_ROWS = 1024
# Numbers in a piece's temporaries, (rows, F) each, which should stay in the cache.
_PIECE_NUMBERS = 2**20
# Rows that are gathered at a time, to be summed over choices.
_GATHERED_ROWS = 16 * _PIECE_ROWS
# Up to so many rows for each expert a product is not worth its call.
_FEW_ROWS = 4


def loop_ffn(
    x_Nd: Tensor,
    gates_NK: Tensor,
    plan: DispatchPlan,
    weights: ExpertWeights,
    activation: str,
    dropout: float,
    quantized: bool,
) -> Tensor:
    """Gate-weighted sum of the experts' outputs, ``(N, d)``; differentiable as often as wanted."""
    seed = int(torch.randint(2**62, ())) if dropout else 0
    settings = InnerSettings(activation, dropout, seed)
    if quantized:
        layout = lay_out(plan, row_multiple(x_Nd.dtype, plan.order_R.size(0), weights.fc1_weight.size(0)))
        return _in_autograds_operations(settings, layout, x_Nd, gates_NK, _present(weights), quantized)
    if _has_few_rows(x_Nd, gates_NK, plan, weights) and FusedInner.applies(settings, x_Nd.dtype):
        return _whole_experts(x_Nd, gates_NK, plan, weights)
    # Inside the function gradients are off, and its context tells of inputs that want one even under no_grad.
    keep = torch.is_grad_enabled()
    return _LoopFFN.apply(x_Nd, gates_NK, plan, settings, keep, *weights)


def _has_few_rows(x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> bool:
    """Whether there are so few rows, and no gradients, that each is computed by itself, as in a step of decoding."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_Nd, gates_NK, *weights)):
        return False
    whole = all(t is None or t.is_contiguous() for t in (x_Nd, *weights))
    known = all(t is None or t.dtype in (torch.float32, torch.bfloat16) for t in weights)
    return whole and known and plan.order_R.size(0) <= _FEW_ROWS * weights.fc1_weight.size(0)


def _whole_experts(x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
    """The output, by the kernel for few rows."""
    x_Rd = x_Nd.index_select(0, plan.source_R)
    y_Rd = torch.empty_like(x_Rd)
    vectors = (weights.fc1_bias, weights.layernorm_weight, weights.layernorm_bias, weights.fc2_bias)
    wide = (None if vector is None else vector.float().contiguous() for vector in vectors)
    torch.ops.mhmoe_cpu.gelu_experts(
        x_Rd, plan.expert_of_row(), weights.fc1_weight, weights.fc2_weight, *wide, y_Rd
    )  # fmt: skip
    return combine(y_Rd, gates_NK, plan)


def _piece_rows(weights: ExpertWeights) -> int:
    """How many rows are computed at a time: fewer where experts are wide, for the cache.

    But several for each column of a sub-token: every piece adds to all gradients of the weights.
    """
    hidden_dim, dim = weights.fc1_weight.shape[1:]
    return min(max(_PIECE_NUMBERS // hidden_dim, 4 * dim, 256), _PIECE_ROWS)


def _at(stacked: Tensor | None, expert: int) -> Tensor | None:
    return None if stacked is None else stacked[expert]


def _of_experts(weights: ExpertWeights) -> list[ExpertWeights]:
    """Each expert's own; views, made by one operation for each stack."""
    num_experts = weights.fc1_weight.size(0)
    return [ExpertWeights(*own) for own in zip(*([None] * num_experts if w is None else w.unbind() for w in weights))]


def _cast(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    return weights.each(lambda weight: weight.to(dtype))


def _normed(weights: ExpertWeights) -> NormedLinear | None:
    """An expert's LayerNorm and second map; None without LayerNorm."""
    if weights.layernorm_weight is None or weights.layernorm_bias is None:
        return None
    return NormedLinear.of(weights.layernorm_weight, weights.layernorm_bias, weights.fc2_weight, weights.fc2_bias)


class _LoopFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_Nd: Tensor,
        gates_NK: Tensor,
        plan: DispatchPlan,
        settings: InnerSettings,
        keep: bool,
        *weights: Tensor | None,
    ) -> Tensor:
        given = ExpertWeights(*weights)  # type: ignore[arg-type]
        num_experts, hidden_dim = given.fc1_weight.shape[:2]
        layout = lay_out(plan, row_multiple(x_Nd.dtype, plan.order_R.size(0), num_experts))
        source_R = layout.plan.source_R
        rows, keep = layout.ends[-1], keep and any(ctx.needs_input_grad)
        # Without a backward one piece of pre-activations is enough, used again and again.
        piece_rows = min(rows, _piece_rows(given))
        kept_rows = rows if keep else piece_rows
        hidden_RF = _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        gate_RF = None if given.gate_weight is None else _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        stats_2R = x_Nd.new_empty((2, kept_rows), dtype=torch.promote_types(x_Nd.dtype, torch.float32))
        inner = inner_of(settings, piece_rows, hidden_RF, has_backward=False)
        y_Rd = _rows_and_zeros(rows, x_Nd)
        of_experts = _of_experts(given)
        for expert, pieces in layout.pieces(piece_rows):
            exact = of_experts[expert]
            own, normed = _cast(exact, x_Nd.dtype), _normed(exact)
            for piece in pieces:
                kept = piece if keep else slice(0, piece.stop - piece.start)
                x = x_Nd.index_select(0, source_R[piece])
                hidden = torch.mm(x, own.fc1_weight.t(), out=hidden_RF[kept])
                gate = None
                if own.gate_weight is not None and gate_RF is not None:
                    gate = torch.mm(x, own.gate_weight.t(), out=gate_RF[kept])
                mean, rstd = stats_2R[:, kept]
                activated = inner.forward(own, piece, hidden, gate, normed and (mean, rstd))
                y = torch.mm(activated, own.fc2_weight.t(), out=y_Rd[piece])
                if normed is not None:
                    normed.finish(y, rstd)
                elif own.fc2_bias is not None:
                    y.add_(own.fc2_bias)
        if keep:
            ctx.settings, ctx.layout = settings, layout
            ctx.save_for_backward(x_Nd, gates_NK, hidden_RF, gate_RF, stats_2R, y_Rd, *given)
        return _sum_of_choices(y_Rd, layout.plan, gates_NK)

    @staticmethod
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor | None, ...]:
        x_Nd, gates_NK, hidden_RF, gate_RF, stats_2R, y_Rd, *given = ctx.saved_tensors
        weights = ExpertWeights(*given)
        if torch.is_grad_enabled() or eager_obstacle([grad_Nd]):  # create_graph, or a batch of gradients
            return _differentiable_backward(ctx, grad_Nd, x_Nd, gates_NK, weights)
        layout: Layout = ctx.layout
        grads = _Gradients(weights, ctx.needs_input_grad[5:], layout.ends)
        source_R = layout.plan.source_R
        gates_R = layout.gates(gates_NK).to(grad_Nd.dtype)
        gates_grad_R = stats_2R.new_zeros(len(y_Rd))
        x_grad_Rd = _rows_and_zeros(layout.ends[-1], x_Nd)
        piece_rows = min(layout.ends[-1], _piece_rows(weights))
        inner = inner_of(ctx.settings, piece_rows, hidden_RF, has_backward=True)
        of_experts = _of_experts(weights)

        for expert, pieces in layout.pieces(piece_rows):
            exact = of_experts[expert]
            own, normed = _cast(exact, x_Nd.dtype), _normed(exact)
            for piece in pieces:
                x = x_Nd.index_select(0, source_R[piece])
                y_grad = grad_Nd.index_select(0, source_R[piece])
                dot = torch.sum(y_grad * y_Rd[piece], dim=1, dtype=gates_grad_R.dtype, out=gates_grad_R[piece])
                y_grad.mul_(gates_R[piece].unsqueeze(1))
                grads.add_rows("fc2_bias", expert, piece, y_grad)
                norm = None
                if normed is not None:
                    mean, rstd = stats_2R[:, piece]
                    y_grad.mul_(rstd.unsqueeze(1))
                    norm = (mean, *normed.input_grad(y_grad, rstd, dot * gates_R[piece], hidden_RF.size(1)))
                torch.mm(y_grad, own.fc2_weight, out=inner.grad_buffer(len(x)))
                gate = None if gate_RF is None else gate_RF[piece]
                activated, grad, gate_grad = inner.backward(own, piece, hidden_RF[piece], gate, norm)
                grads.add_product("fc2_weight", expert, piece, y_grad, activated)
                grads.add("fc1", expert, piece, grad, x)
                x_grad = torch.mm(grad, own.fc1_weight, out=x_grad_Rd[piece])
                if gate_grad is not None and own.gate_weight is not None:
                    grads.add("gate", expert, piece, gate_grad, x)
                    x_grad.addmm_(gate_grad, own.gate_weight)
            grads.finish_norm(expert)
        x_grad_Nd = _sum_of_choices(x_grad_Rd, layout.plan)
        gates_grad_NK = gates_grad_R.index_select(0, layout.plan.inverse_R).view_as(gates_NK)
        return x_grad_Nd, gates_grad_NK.to(gates_NK.dtype), None, None, None, *grads.tensors()


def _rows_and_zeros(rows: int, like_Nd: Tensor) -> Tensor:
    """Memory for the experts' rows, and behind them one of zeros for all rows of the virtual expert."""
    made = _cpu_memory.empty((rows + 1, like_Nd.size(1)), like_Nd)
    made[rows:].zero_()
    return made


def _sum_of_choices(rows_Rd: Tensor, plan: DispatchPlan, gates_NK: Tensor | None = None) -> Tensor:
    """The sum, weighted if there are weights, of each sub-token's rows, ``(N, d)``: :func:`combine` piece by piece.

    Where sub-tokens go to few of K = E choices, all at once would take more than everything else.
    """
    places_NK = plan.inverse_R.view(-1, plan.top_k)
    y_Nd = rows_Rd.new_empty(len(places_NK), rows_Rd.size(1))
    for start in range(0, len(places_NK), step := max(_GATHERED_ROWS // plan.top_k, 1)):
        piece = slice(start, start + step)
        y_PKd = rows_Rd.index_select(0, places_NK[piece].flatten()).view(-1, plan.top_k, rows_Rd.size(1))
        if gates_NK is not None:
            y_PKd.mul_(gates_NK[piece].to(y_PKd.dtype).unsqueeze(2))
        torch.sum(y_PKd, dim=1, out=y_Nd[piece])
    return y_Nd


def _differentiable_backward(
    ctx: Any, grad_Nd: Tensor, x_Nd: Tensor, gates_NK: Tensor, weights: ExpertWeights
) -> tuple[Tensor | None, ...]:
    """What ``_LoopFFN.backward`` returns, as functions of all that they depend on."""
    with without_autocast("cpu"):  # as in the forward
        forward = functools.partial(_in_autograds_operations, ctx.settings, ctx.layout)
        gradients = torch.func.vjp(forward, x_Nd, gates_NK, _present(weights))[1]
        x_grad_Nd, gates_grad_NK, grads = gradients(grad_Nd)
    return x_grad_Nd, gates_grad_NK, None, None, None, *(grads.get(name) for name in ExpertWeights._fields)


def _present(weights: ExpertWeights) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights._asdict().items() if weight is not None}


def _in_autograds_operations(
    settings: InnerSettings,
    layout: Layout,
    x_Nd: Tensor,
    gates_NK: Tensor,
    present: dict[str, Tensor],
    quantized: bool = False,
) -> Tensor:
    """The output of ``_LoopFFN.forward``, dropout included."""
    cast = {name: weight.to(x_Nd.dtype) for name, weight in present.items()}
    weights = ExpertWeights(**{**dict.fromkeys(ExpertWeights._fields), **cast})  # type: ignore[arg-type]
    source_R = layout.plan.source_R

    def network(x: Tensor, expert: int, piece: slice) -> Tensor:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight[expert], _at(bias, expert))

        def drop(inner: Tensor) -> Tensor:
            if not settings.dropout:
                return inner
            return inner * dropout_scale(settings, piece, inner.new_empty(inner.shape))

        def of_expert(stacked: Tensor) -> Tensor:
            return stacked[expert]

        return expert_network(x, weights, settings.activation, drop, linear, of_expert, quantized)

    by_expert = layout.pieces(_piece_rows(weights))
    pieces = [(expert, piece) for expert, pieces in by_expert for piece in pieces]
    pieces = pieces or [(0, slice(0, 0))]  # so that weights have gradients without rows, too
    outputs = [network(x_Nd.index_select(0, source_R[piece]), expert, piece) for expert, piece in pieces]
    return combine(torch.cat([*outputs, x_Nd.new_zeros(1, x_Nd.size(1))]), gates_NK, layout.plan)


class _Gradients:
    """Gradients of the stacked parameters, summed piece by piece.

    Args:
        weights: whose gradients are summed, each in its weight's dtype.
        needed: for which of them.
        ends: where the experts' rows end.
    """

    # All of these follow from two sums, which the gradients of fc2 hold meanwhile.
    _NORMED = ExpertWeights._fields[4:]

    def __init__(self, weights: ExpertWeights, needed: tuple[bool, ...], ends: list[int]) -> None:
        self._weights, self._needed, self._starts = weights, needed, [0, *ends]
        idle = [expert for expert, (start, end) in enumerate(zip(self._starts, ends)) if start == end]
        self._grads: dict[str, Tensor | None] = {}
        fc2_w = weights.fc2_weight
        normed = weights[4] is not None and any(needed[4:])
        for name, weight, need in zip(ExpertWeights._fields, weights, needed):
            if normed and name in self._NORMED:
                need = True
                weight = fc2_w[:, :, 0] if weight is None else weight  # a bias's shape
            grad = None if weight is None or not need else _cpu_memory.empty(tuple(weight.shape), weight)
            if grad is not None and idle:  # an empty list of indices would cost as much as a full one
                grad[idle] = 0
            self._grads[name] = grad

    def add(self, name: str, expert: int, piece: slice, output_grad: Tensor, x: Tensor) -> None:
        """The share of one piece in a linear map's weight and bias."""
        self.add_product(f"{name}_weight", expert, piece, output_grad, x)
        self.add_rows(f"{name}_bias", expert, piece, output_grad)

    def add_product(self, name: str, expert: int, piece: slice, output_grad: Tensor, x: Tensor) -> None:
        """The share of one piece in a linear map's weight."""
        total = self._grads[name]
        if total is None:
            return
        begun = piece.start > self._starts[expert]
        if total.dtype == x.dtype:
            # beta=0: the first piece writes, so the memory need not be cleared beforehand.
            total[expert].addmm_(output_grad.t(), x, beta=float(begun))
        elif begun:
            total[expert] += output_grad.t() @ x
        else:
            total[expert] = output_grad.t() @ x

    def add_rows(self, name: str, expert: int, piece: slice, rows: Tensor) -> None:
        """The share of one piece in a vector that was added to all rows."""
        total = self._grads[name]
        if total is not None and piece.start > self._starts[expert]:
            total[expert] += rows.sum(0, dtype=total.dtype)
        elif total is not None:
            torch.sum(rows, dim=0, dtype=total.dtype, out=total[expert])

    def finish_norm(self, expert: int) -> None:
        """After an expert's last piece: the gradients of its LayerNorm and ``fc2`` from the sums so far."""
        norm, norm_bias, fc2, fc2_bias = (self._grads[name] for name in self._NORMED)
        weights = self._weights
        if norm is None or norm_bias is None or fc2 is None or fc2_bias is None:
            return
        assert weights.layernorm_weight is not None and weights.layernorm_bias is not None
        of_expert = weights.layernorm_weight[expert], weights.layernorm_bias[expert], weights.fc2_weight[expert]
        parameter_grads(fc2[expert], fc2_bias[expert], of_expert, norm[expert], norm_bias[expert])

    def tensors(self) -> list[Tensor | None]:
        """In the order of ``ExpertWeights``."""
        return [grad if need else None for grad, need in zip(self._grads.values(), self._needed)]

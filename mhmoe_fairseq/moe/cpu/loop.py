"""Experts on a CPU: a loop over contiguous slices of sorted rows, with a hand-written backward.

What is kept for the backward is the pre-activation alone, ``(R, F)``; plain autograd keeps the activation too and
holds the sorted input and the gradient of whole slices. The rest is recomputed in pieces small enough for the cache.

Values are read on the host and written to memory of its own, and the backward is no graph. So the loop cannot be
traced or transformed (:func:`loop_obstacle`), and where a gradient is to be differentiated again its backward computes
it anew in autograd's operations, with the same dropout.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .._expert_network import ExpertWeights, expert_network
from .._modes import in_forward_mode, without_autocast
from ..dispatch import DispatchPlan, combine
from . import memory as _cpu_memory
from .norm import NormedLinear

# Rows per piece: the temporaries of one piece, (rows, F) each, should stay in the last-level cache.
_PIECE_ROWS = 1024


class _Settings(NamedTuple):
    activation: str
    dropout: float
    seed: int


def loop_ffn(
    x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Gate-weighted sum of the experts' outputs, ``(N, d)``; differentiable as often as wanted."""
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _LoopFFN.apply(x_Nd, gates_NK, plan, _Settings(activation, dropout, seed), *weights)


def loop_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Where the loop cannot compute what is asked: the reason, to stand behind "cannot be used"; None where it can."""
    # The first is a constant to torch.compile, which could not trace what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None:
        return "where operations are traced (torch.compile, torch.export, torch.jit.trace, make_fx)"
    if torch._C._are_functorch_transforms_active():  # what autograd.Function itself asks
        return "under a transform of torch.func (grad, jvp, vmap, ...)"
    if in_forward_mode():
        return "in forward-mode differentiation (torch.autograd.forward_ad)"
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter, type(None)):
            return f"on a {type(tensor).__name__}, which is no plain tensor"
        if tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor):
            return "on a batch of gradients (is_grads_batched)"
    return None


def _activate(activation: str, hidden: Tensor, gate: Tensor | None, out: Tensor) -> Tensor:
    """The activation of one piece, written to ``out``."""
    if gate is not None:
        return torch.ops.aten.silu.out(hidden, out=out).mul_(gate)
    if activation == "gelu":
        return torch.ops.aten.gelu.out(hidden, out=out)
    return torch.clamp(hidden, min=0, out=out)


def _activate_backward(
    activation: str, hidden: Tensor, gate: Tensor | None, grad: Tensor, scratch: Tensor
) -> Tensor | None:
    """Turns ``grad`` in place into the pre-activation's gradient; returns the SwiGLU gate's, written to ``scratch``."""
    if gate is not None:
        gate_grad = torch.ops.aten.silu.out(hidden, out=scratch).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(gate), hidden, grad_input=grad)
        return gate_grad
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    else:
        torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
    return None


def _inner(settings: _Settings, piece: slice, hidden: Tensor, gate: Tensor | None, scratch: Sequence[Tensor]) -> Tensor:
    """Activation and dropout of one piece, in ``scratch[0]``; what dropout multiplied by stays in ``scratch[-1]``."""
    inner = _activate(settings.activation, hidden, gate, scratch[0])
    if settings.dropout:
        inner.mul_(_dropout_scale(settings, piece, scratch[-1]))
    return inner


def _dropout_scale(settings: _Settings, piece: slice, out: Tensor) -> Tensor:
    """What dropout multiplies the activations of a piece by, written to ``out``."""
    # The piece's own generator, so that the backward can draw the same again.
    generator = torch.Generator().manual_seed((settings.seed + piece.start) % 2**63)
    return out.bernoulli_(1 - settings.dropout, generator=generator).div_(1 - settings.dropout)


def _pieces(ends: list[int]) -> list[tuple[int, slice]]:
    """(expert, rows) in order; an expert's rows come in one or more pieces, an idle expert has none."""
    pieces, start = [], 0
    for expert, end in enumerate(ends):
        pieces += [(expert, slice(row, min(row + _PIECE_ROWS, end))) for row in range(start, end, _PIECE_ROWS)]
        start = end
    return pieces


def _at(stacked: Tensor | None, expert: int) -> Tensor | None:
    return None if stacked is None else stacked[expert]


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch.mm(x, weight.t(), out=out)
    # addmm would first write the bias to all of ``out``; here ``out`` is still in the cache.
    return out if bias is None else out.add_(bias)


def _normed(weights: Sequence[Tensor | None], expert: int) -> NormedLinear | None:
    """The expert's LayerNorm and second map; None without LayerNorm."""
    norm_w, norm_b, fc2_w, fc2_b = weights[4:]
    if norm_w is None or norm_b is None or fc2_w is None:
        return None
    return NormedLinear(norm_w[expert], norm_b[expert], fc2_w[expert], _at(fc2_b, expert))


class _LoopFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, settings: _Settings, *weights: Tensor | None
    ) -> Tensor:
        fc1_w, fc1_b, gate_w, gate_b, _, _, fc2_w, fc2_b = weights
        assert fc1_w is not None and fc2_w is not None
        ends = plan.offsets_E.tolist()
        source_R = plan.source_R
        rows, hidden_dim = source_R.size(0), fc1_w.size(1)
        training = any(ctx.needs_input_grad)
        # Without a backward one piece of pre-activations is enough, used again and again.
        kept_rows = rows if training else min(rows, _PIECE_ROWS)
        hidden_RF = _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        gate_RF = None if gate_w is None else _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        stats_2R = x_Nd.new_empty((2, kept_rows), dtype=torch.promote_types(x_Nd.dtype, torch.float32))
        scratch_SPF = _scratch(1 + bool(settings.dropout), rows, hidden_RF)
        y_Rd = _cpu_memory.empty((rows, x_Nd.size(1)), x_Nd)
        y_Rd[ends[-1] :].zero_()  # rows of the virtual expert
        for expert, piece in _pieces(ends):
            here = slice(0, piece.stop - piece.start)
            kept = piece if training else here
            x = x_Nd.index_select(0, source_R[piece])
            hidden = _linear_into(hidden_RF[kept], x, fc1_w[expert], _at(fc1_b, expert))
            gate = None
            if gate_w is not None and gate_RF is not None:
                gate = _linear_into(gate_RF[kept], x, gate_w[expert], _at(gate_b, expert))
            inner = _inner(settings, piece, hidden, gate, scratch_SPF[:, here].unbind())
            normed = _normed(weights, expert)
            if normed is None:
                _linear_into(y_Rd[piece], inner, fc2_w[expert], _at(fc2_b, expert))
            else:
                mean, rstd = stats_2R[:, kept]
                normed.forward(inner, mean, rstd, y_Rd[piece])
        if training:
            ctx.plan, ctx.settings, ctx.ends = plan, settings, ends
            ctx.save_for_backward(x_Nd, gates_NK, hidden_RF, gate_RF, stats_2R, y_Rd, *weights)
        return combine(y_Rd, gates_NK, plan)

    @staticmethod
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor | None, ...]:
        x_Nd, gates_NK, hidden_RF, gate_RF, stats_2R, y_Rd, *weights = ctx.saved_tensors
        if torch.is_grad_enabled() or loop_obstacle([grad_Nd]):  # create_graph, or a batch of gradients
            return _differentiable_backward(ctx, grad_Nd, x_Nd, gates_NK, ExpertWeights(*weights))
        plan, settings = ctx.plan, ctx.settings
        fc1_w, _, gate_w, _, _, _, fc2_w, _ = weights
        grads = _Gradients(weights, ctx.needs_input_grad[4:], ctx.ends)
        source_R = plan.source_R
        gates_R = gates_NK.reshape(-1).index_select(0, plan.order_R).to(grad_Nd.dtype)
        gates_grad_R = torch.zeros_like(gates_R)
        x_grad_Rd = _cpu_memory.empty(tuple(y_Rd.shape), y_Rd)
        x_grad_Rd[ctx.ends[-1] :].zero_()
        scratch_SPF = _scratch(2 + bool(settings.dropout), len(y_Rd), hidden_RF)

        for expert, piece in _pieces(ctx.ends):
            x = x_Nd.index_select(0, source_R[piece])
            y_grad = grad_Nd.index_select(0, source_R[piece])
            torch.linalg.vecdot(y_grad, y_Rd[piece], out=gates_grad_R[piece])
            y_grad.mul_(gates_R[piece].unsqueeze(1))
            hidden, gate = hidden_RF[piece], None if gate_RF is None else gate_RF[piece]
            scratch = scratch_SPF[:, : piece.stop - piece.start].unbind()
            inner, grad = _inner(settings, piece, hidden, gate, scratch), scratch[1]
            normed = _normed(weights, expert)
            if normed is None:
                grads.add("fc2", expert, piece, y_grad, inner)
                torch.mm(y_grad, fc2_w[expert], out=grad)
            else:
                mean, rstd = stats_2R[:, piece]
                inner.sub_(mean.unsqueeze(1))
                grads.add_normed(normed, expert, piece, y_grad, rstd, inner)
                normed.backward(inner, rstd, y_grad, gates_grad_R[piece] * gates_R[piece], grad)
            if settings.dropout:
                grad.mul_(scratch[-1])
            gate_grad = _activate_backward(settings.activation, hidden, gate, grad, scratch[0])
            grads.add("fc1", expert, piece, grad, x)
            x_grad = torch.mm(grad, fc1_w[expert], out=x_grad_Rd[piece])
            if gate_grad is not None:
                grads.add("gate", expert, piece, gate_grad, x)
                x_grad.addmm_(gate_grad, gate_w[expert])

        def to_choices(rows_R: Tensor) -> Tensor:
            return rows_R.index_select(0, plan.inverse_R).view(*gates_NK.shape, *rows_R.shape[1:])

        x_grad_Nd = to_choices(x_grad_Rd).sum(1)
        return x_grad_Nd, to_choices(gates_grad_R).to(gates_NK.dtype), None, None, *grads.tensors()


def _differentiable_backward(
    ctx: Any, grad_Nd: Tensor, x_Nd: Tensor, gates_NK: Tensor, weights: ExpertWeights
) -> tuple[Tensor | None, ...]:
    """What ``_LoopFFN.backward`` returns, as functions of all that they depend on."""
    present = {name: weight for name, weight in weights._asdict().items() if weight is not None}

    with without_autocast("cpu"):  # as in the forward
        forward = functools.partial(_in_autograds_operations, ctx)
        gradients = torch.func.vjp(forward, x_Nd, gates_NK, present)[1]
        x_grad_Nd, gates_grad_NK, grads = gradients(grad_Nd)
    return x_grad_Nd, gates_grad_NK, None, None, *(grads.get(name) for name in ExpertWeights._fields)


def _in_autograds_operations(ctx: Any, x_Nd: Tensor, gates_NK: Tensor, present: dict[str, Tensor]) -> Tensor:
    """The output of ``_LoopFFN.forward``, dropout included."""
    plan, settings, source_R = ctx.plan, ctx.settings, ctx.plan.source_R
    weights = ExpertWeights(**{**dict.fromkeys(ExpertWeights._fields), **present})  # type: ignore[arg-type]

    def network(x: Tensor, expert: int, piece: slice) -> Tensor:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight[expert], _at(bias, expert))

        def drop(inner: Tensor) -> Tensor:
            if not settings.dropout:
                return inner
            return inner * _dropout_scale(settings, piece, inner.new_empty(inner.shape))

        return expert_network(x, weights, settings.activation, drop, linear, lambda stacked: stacked[expert])

    pieces = [network(x_Nd.index_select(0, source_R[piece]), expert, piece) for expert, piece in _pieces(ctx.ends)]
    virtual = x_Nd.new_zeros(source_R.size(0) - ctx.ends[-1], x_Nd.size(1))
    return combine(torch.cat([*pieces, virtual]), gates_NK, plan)


def _scratch(count: int, rows: int, like_RF: Tensor) -> Tensor:
    """``count`` buffers for the temporaries of one piece."""
    return _cpu_memory.empty((count, min(rows, _PIECE_ROWS), like_RF.size(1)), like_RF)


class _Gradients:
    """Gradients of the stacked parameters, summed piece by piece.

    Args:
        weights: as in ``ExpertWeights``.
        needed: for which of them.
        ends: where the experts' rows end.
    """

    # All of these follow from two sums, which the gradients of fc2 hold meanwhile.
    _NORMED = ExpertWeights._fields[4:]

    def __init__(self, weights: Sequence[Tensor | None], needed: tuple[bool, ...], ends: list[int]) -> None:
        self._needed, self._starts, self._ends = needed, [0, *ends], ends
        idle = [expert for expert, (start, end) in enumerate(zip(self._starts, ends)) if start == end]
        self._grads: dict[str, Tensor | None] = {}
        fc2_w = weights[6]
        normed = weights[4] is not None and any(needed[4:])
        for name, weight, need in zip(ExpertWeights._fields, weights, needed):
            if normed and name in self._NORMED:
                need = True
                weight = fc2_w[:, :, 0] if weight is None and fc2_w is not None else weight  # a bias's shape
            grad = None if weight is None or not need else _cpu_memory.empty(tuple(weight.shape), weight)
            if grad is not None and idle:  # an empty list of indices would cost as much as a full one
                grad[idle] = 0
            self._grads[name] = grad

    def add(self, name: str, expert: int, piece: slice, output_grad: Tensor, x: Tensor) -> None:
        """The share of one piece in a linear map's weight and bias."""
        self._add_product(f"{name}_weight", expert, piece, output_grad, x)
        self._add_rows(f"{name}_bias", expert, piece, output_grad)

    def add_normed(
        self, layer: NormedLinear, expert: int, piece: slice, output_grad: Tensor, rstd: Tensor, centered: Tensor
    ) -> None:
        """The share of one piece in a LayerNorm and fc2; turns ``output_grad`` into its product with ``rstd``."""
        self._add_rows("fc2_bias", expert, piece, output_grad)
        self._add_product("fc2_weight", expert, piece, output_grad.mul_(rstd.unsqueeze(1)), centered)
        norm, norm_bias, fc2, fc2_bias = (self._grads[name] for name in self._NORMED)
        is_last = piece.stop == self._ends[expert]
        if is_last and norm is not None and norm_bias is not None and fc2 is not None and fc2_bias is not None:
            layer.parameter_grads(fc2[expert], fc2_bias[expert], norm[expert], norm_bias[expert])

    def _add_product(self, name: str, expert: int, piece: slice, output_grad: Tensor, x: Tensor) -> None:
        total = self._grads[name]
        if total is not None:
            # beta=0: the first piece writes, so the memory need not be cleared beforehand.
            begun = piece.start > self._starts[expert]
            total[expert].addmm_(output_grad.t(), x, beta=float(begun))

    def _add_rows(self, name: str, expert: int, piece: slice, rows: Tensor) -> None:
        total = self._grads[name]
        if total is not None and piece.start > self._starts[expert]:
            total[expert] += rows.sum(0)
        elif total is not None:
            torch.sum(rows, dim=0, out=total[expert])

    def tensors(self) -> list[Tensor | None]:
        """In the order of ``ExpertWeights``."""
        return [grad if need else None for grad, need in zip(self._grads.values(), self._needed)]

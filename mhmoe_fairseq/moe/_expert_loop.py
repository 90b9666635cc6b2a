"""Experts on a CPU: a loop over contiguous slices of sorted rows, with a hand-written backward.

What is kept for the backward is the pre-activation alone, ``(R, F)``; plain autograd keeps the activation too and
holds the sorted input and the gradient of whole slices. The rest is recomputed in pieces small enough for the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _cpu_memory
from .dispatch import DispatchPlan, combine

if TYPE_CHECKING:
    from .experts import ExpertWeights

# Rows per piece: the temporaries of one piece, (rows, F) each, should stay in the last-level cache.
_PIECE_ROWS = 1024


class _Settings(NamedTuple):
    activation: str
    dropout: float
    seed: int


def loop_ffn(
    x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, weights: ExpertWeights, activation: str, dropout: float
) -> Tensor:
    """Gate-weighted sum of the experts' outputs, ``(N, d)``; differentiable once."""
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _LoopFFN.apply(x_Nd, gates_NK, plan, _Settings(activation, dropout, seed), *weights)


def _activate(activation: str, hidden: Tensor, gate: Tensor | None, out: Tensor) -> Tensor:
    """The activation of one piece, written to ``out``."""
    if gate is not None:
        return torch.ops.aten.silu.out(hidden, out=out).mul_(gate)
    if activation == "gelu":
        return torch.ops.aten.gelu.out(hidden, out=out)
    return torch.clamp(hidden, min=0, out=out)


def _activate_backward(activation: str, hidden: Tensor, gate: Tensor | None, grad: Tensor) -> Tensor | None:
    """Turns ``grad`` in place into the pre-activation's gradient; returns the SwiGLU gate's."""
    if gate is not None:
        gate_grad = F.silu(hidden).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(gate), hidden, grad_input=grad)
        return gate_grad
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
    else:
        torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
    return None


def _regularize(
    settings: _Settings, piece: slice, inner: Tensor, norm_w: Tensor | None, norm_b: Tensor | None
) -> Tensor:
    """Dropout and LayerNorm between activation and fc2.

    Dropout draws from the piece's own generator, so that the backward can draw the same mask again.
    """
    if settings.dropout:
        generator = torch.Generator().manual_seed((settings.seed + piece.start) % 2**63)
        keep = torch.empty_like(inner).bernoulli_(1 - settings.dropout, generator=generator)
        inner = inner * keep.div_(1 - settings.dropout)
    if norm_w is not None:
        inner = F.layer_norm(inner, inner.shape[-1:], norm_w, norm_b)
    return inner


def _regularize_backward(
    settings: _Settings, piece: slice, inner: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``_regularize`` of one piece again: its output, the gradient of its input, the norm's (if any)."""
    if not settings.dropout and norm_w is None:
        return inner, grad, []
    leaves = [t.detach().requires_grad_() for t in (inner, norm_w, norm_b) if t is not None]
    with torch.enable_grad():
        output = _regularize(settings, piece, leaves[0], *(leaves[1:] or (None, None)))
    inner_grad, *norm_grads = torch.autograd.grad(output, leaves, grad)
    return output.detach(), inner_grad, norm_grads


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


class _LoopFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_Nd: Tensor, gates_NK: Tensor, plan: DispatchPlan, settings: _Settings, *weights: Tensor | None
    ) -> Tensor:
        fc1_w, fc1_b, gate_w, gate_b, norm_w, norm_b, fc2_w, fc2_b = weights
        assert fc1_w is not None and fc2_w is not None
        ends = plan.offsets_E.tolist()
        source_R = plan.source_R
        rows, hidden_dim = source_R.size(0), fc1_w.size(1)
        training = any(ctx.needs_input_grad)
        # Without a backward one piece of pre-activations is enough, used again and again.
        kept_rows = rows if training else min(rows, _PIECE_ROWS)
        hidden_RF = _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        gate_RF = None if gate_w is None else _cpu_memory.empty((kept_rows, hidden_dim), x_Nd)
        scratch_PF = _cpu_memory.empty((min(rows, _PIECE_ROWS), hidden_dim), x_Nd)
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
            inner = _activate(settings.activation, hidden, gate, scratch_PF[here])
            inner = _regularize(settings, piece, inner, _at(norm_w, expert), _at(norm_b, expert))
            _linear_into(y_Rd[piece], inner, fc2_w[expert], _at(fc2_b, expert))
        if training:
            ctx.plan, ctx.settings, ctx.ends = plan, settings, ends
            ctx.save_for_backward(x_Nd, gates_NK, hidden_RF, gate_RF, y_Rd, *weights)
        return combine(y_Rd, gates_NK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor | None, ...]:
        x_Nd, gates_NK, hidden_RF, gate_RF, y_Rd, *weights = ctx.saved_tensors
        plan, settings = ctx.plan, ctx.settings
        fc1_w, _, gate_w, _, norm_w, norm_b, fc2_w, _ = weights
        grads = _Gradients(weights, ctx.needs_input_grad[4:], idle=_idle_experts(ctx.ends))
        source_R = plan.source_R
        gates_R = gates_NK.reshape(-1).index_select(0, plan.order_R).to(grad_Nd.dtype)
        gates_grad_R = torch.zeros_like(gates_R)
        x_grad_Rd = _cpu_memory.empty(tuple(y_Rd.shape), y_Rd)
        x_grad_Rd[ctx.ends[-1] :].zero_()
        scratch_2PF = _cpu_memory.empty((2, min(len(y_Rd), _PIECE_ROWS), hidden_RF.size(1)), hidden_RF)

        for expert, piece in _pieces(ctx.ends):
            x = x_Nd.index_select(0, source_R[piece])
            y_grad = grad_Nd.index_select(0, source_R[piece])
            torch.linalg.vecdot(y_grad, y_Rd[piece], out=gates_grad_R[piece])
            y_grad.mul_(gates_R[piece].unsqueeze(1))
            hidden, gate = hidden_RF[piece], None if gate_RF is None else gate_RF[piece]
            scratch, grad = scratch_2PF[:, : piece.stop - piece.start]
            inner = _activate(settings.activation, hidden, gate, scratch)
            torch.mm(y_grad, fc2_w[expert], out=grad)
            inner, grad, norm_grads = _regularize_backward(
                settings, piece, inner, _at(norm_w, expert), _at(norm_b, expert), grad
            )
            grads.add_norm(expert, *norm_grads)
            grads.add("fc2", expert, y_grad, inner)
            gate_grad = _activate_backward(settings.activation, hidden, gate, grad)
            grads.add("fc1", expert, grad, x)
            x_grad = torch.mm(grad, fc1_w[expert], out=x_grad_Rd[piece])
            if gate_grad is not None:
                grads.add("gate", expert, gate_grad, x)
                x_grad.addmm_(gate_grad, gate_w[expert])

        def to_choices(rows_R: Tensor) -> Tensor:
            return rows_R.index_select(0, plan.inverse_R).view(*gates_NK.shape, *rows_R.shape[1:])

        x_grad_Nd = to_choices(x_grad_Rd).sum(1)
        return x_grad_Nd, to_choices(gates_grad_R).to(gates_NK.dtype), None, None, *grads.tensors()


def _idle_experts(ends: list[int]) -> list[int]:
    return [expert for expert, (start, end) in enumerate(zip([0, *ends], ends)) if start == end]


class _Gradients:
    """Gradients of the stacked parameters, in the order of ``ExpertWeights``, summed piece by piece."""

    _NAMES = ("fc1", "fc1_bias", "gate", "gate_bias", "norm", "norm_bias", "fc2", "fc2_bias")

    def __init__(self, weights: Sequence[Tensor | None], needed: tuple[bool, ...], idle: list[int]) -> None:
        self._grads: dict[str, Tensor | None] = {}
        self._begun: set[tuple[str, int]] = set()
        for name, weight, need in zip(self._NAMES, weights, needed):
            grad = None
            if weight is not None and need:
                grad = _cpu_memory.empty(tuple(weight.shape), weight)
                grad[idle] = 0
            self._grads[name] = grad

    def add(self, name: str, expert: int, output_grad: Tensor, x: Tensor) -> None:
        """The share of one piece in a linear map's weight and bias."""
        weight = self._grads[name]
        if weight is not None:
            # beta=0: the first piece writes, so the memory need not be cleared beforehand.
            weight[expert].addmm_(output_grad.t(), x, beta=float(self._has_begun(name, expert)))
        self._add_rows(name + "_bias", expert, output_grad)

    def add_norm(self, expert: int, weight_grad: Tensor | None = None, bias_grad: Tensor | None = None) -> None:
        """The share of one piece in the LayerNorm."""
        if weight_grad is not None and bias_grad is not None:
            self._add_rows("norm", expert, weight_grad.unsqueeze(0))
            self._add_rows("norm_bias", expert, bias_grad.unsqueeze(0))

    def _add_rows(self, name: str, expert: int, rows: Tensor) -> None:
        total = self._grads[name]
        if total is None:
            return
        if self._has_begun(name, expert):
            total[expert] += rows.sum(0)
        else:
            torch.sum(rows, dim=0, out=total[expert])

    def _has_begun(self, name: str, expert: int) -> bool:
        begun = (name, expert) in self._begun
        self._begun.add((name, expert))
        return begun

    def tensors(self) -> list[Tensor | None]:
        """In the order of ``ExpertWeights``."""
        return [self._grads[name] for name in self._NAMES]

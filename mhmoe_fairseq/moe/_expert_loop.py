"""Experts on a CPU: a loop over contiguous slices of sorted rows, with a hand-written backward.

What is kept for the backward is the pre-activation alone, ``(R, F)``; plain autograd keeps the activation too and
holds the sorted input and the gradient of whole slices. The rest is recomputed in pieces small enough for the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import DispatchPlan, combine

if TYPE_CHECKING:
    from .experts import ExpertWeights

# Rows per piece: the temporaries of one piece, (rows, F) each, should stay in the last-level cache.
_PIECE_ROWS = 512


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


def _inner(
    settings: _Settings, piece: slice, hidden: Tensor, gate: Tensor | None, norm_w: Tensor | None, norm_b: Tensor | None
) -> Tensor:
    """From pre-activation to fc2's input. Dropout draws from a generator of the piece, so it can be drawn again."""
    if gate is not None:
        inner = F.silu(hidden) * gate
    else:
        inner = F.gelu(hidden) if settings.activation == "gelu" else F.relu(hidden)
    if settings.dropout:
        generator = torch.Generator().manual_seed((settings.seed + piece.start) % 2**63)
        keep = torch.empty_like(inner).bernoulli_(1 - settings.dropout, generator=generator)
        inner = inner * keep.div_(1 - settings.dropout)
    if norm_w is not None:
        inner = F.layer_norm(inner, inner.shape[-1:], norm_w, norm_b)
    return inner


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
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


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
        hidden_rows = rows if training else min(rows, _PIECE_ROWS)
        hidden_RF = x_Nd.new_empty(hidden_rows, hidden_dim)
        gate_RF = None if gate_w is None else torch.empty_like(hidden_RF)
        y_Rd = torch.empty_like(x_Nd[:1]).expand(rows, -1).contiguous() if rows else x_Nd.new_empty(0, x_Nd.size(1))
        y_Rd[ends[-1] :].zero_()  # rows of the virtual expert
        for expert, piece in _pieces(ends):
            kept = piece if training else slice(0, piece.stop - piece.start)
            x = x_Nd.index_select(0, source_R[piece])
            hidden = _linear_into(hidden_RF[kept], x, fc1_w[expert], _at(fc1_b, expert))
            gate = None
            if gate_w is not None and gate_RF is not None:
                gate = _linear_into(gate_RF[kept], x, gate_w[expert], _at(gate_b, expert))
            inner = _inner(settings, piece, hidden, gate, _at(norm_w, expert), _at(norm_b, expert))
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
        grads = _Gradients(weights, ctx.needs_input_grad[4:])
        source_R = plan.source_R
        gates_R = gates_NK.reshape(-1).index_select(0, plan.order_R).to(grad_Nd.dtype)
        gate_grad_R = gates_R.new_zeros(gates_R.shape)
        x_grad_Rd = torch.zeros_like(y_Rd)

        for expert, piece in _pieces(ctx.ends):
            rows = source_R[piece]
            x = x_Nd.index_select(0, rows)
            y_grad = grad_Nd.index_select(0, rows)
            torch.sum(y_grad * y_Rd[piece], dim=1, out=gate_grad_R[piece])
            y_grad.mul_(gates_R[piece].unsqueeze(1))
            leaves = [_leaf(hidden_RF[piece])]
            leaves += [_leaf(t) for t in (None if gate_RF is None else gate_RF[piece], _at(norm_w, expert), _at(norm_b, expert))]
            with torch.enable_grad():
                inner = _inner(settings, piece, *leaves)
            grads.add("fc2", expert, y_grad, inner.detach())
            wanted = [leaf for leaf in leaves if leaf is not None]
            inner_grads = iter(torch.autograd.grad(inner, wanted, torch.mm(y_grad, fc2_w[expert])))
            hidden_grad, act_gate_grad, norm_w_grad, norm_b_grad = (None if t is None else next(inner_grads) for t in leaves)
            grads.add("fc1", expert, hidden_grad, x)
            x_grad = torch.mm(hidden_grad, fc1_w[expert], out=x_grad_Rd[piece])
            if gate_w is not None:
                grads.add("gate", expert, act_gate_grad, x)
                x_grad.addmm_(act_gate_grad, gate_w[expert])
            if norm_w is not None:
                grads.add_norm(expert, norm_w_grad, norm_b_grad)

        def to_choices(rows_R: Tensor) -> Tensor:
            return rows_R.index_select(0, plan.inverse_R).view(*gates_NK.shape, *rows_R.shape[1:])

        return (
            to_choices(x_grad_Rd).sum(1), to_choices(gate_grad_R).to(gates_NK.dtype), None, None, *grads.tensors()
        )  # fmt: skip


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


class _Gradients:
    """Gradients of the stacked parameters, in the order of ``ExpertWeights``, summed piece by piece."""

    _NAMES = ("fc1", "fc1_bias", "gate", "gate_bias", "norm", "norm_bias", "fc2", "fc2_bias")

    def __init__(self, weights: list[Tensor | None], needed: tuple[bool, ...]) -> None:
        self._grads: dict[str, Tensor | None] = {
            name: torch.zeros_like(w) if w is not None and need else None
            for name, w, need in zip(self._NAMES, weights, needed)
        }

    def add(self, name: str, expert: int, output_grad: Tensor, x: Tensor) -> None:
        """The share of one piece in a linear map's weight and bias."""
        weight, bias = self._grads[name], self._grads[name + "_bias"]
        if weight is not None:
            weight[expert].addmm_(output_grad.t(), x)
        if bias is not None:
            bias[expert] += output_grad.sum(0)

    def add_norm(self, expert: int, weight_grad: Tensor, bias_grad: Tensor) -> None:
        """The share of one piece in the LayerNorm."""
        for name, grad in (("norm", weight_grad), ("norm_bias", bias_grad)):
            total = self._grads[name]
            if total is not None:
                total[expert] += grad

    def tensors(self) -> list[Tensor | None]:
        """In the order of ``ExpertWeights``."""
        return [self._grads[name] for name in self._NAMES]

"""What an expert computes between its two linear maps, for one piece of its rows: bias, activation, dropout, norm.

:class:`Inner` does it in ATen's operations, :class:`FusedInner` in one pass each way where its kernels are built and
know the activation. Both write to buffers of their own, which the next piece overwrites.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._expert_network import ExpertWeights
from . import kernels
from . import memory as _cpu_memory
from .norm import EPS

Norm = tuple[Tensor, ...]


class InnerSettings(NamedTuple):
    """Activation, dropout's probability, and the seed of its masks."""

    activation: str
    dropout: float
    seed: int


def dropout_scale(settings: InnerSettings, piece: slice, out: Tensor) -> Tensor:
    """What dropout multiplies the activations of a piece by, written to ``out``."""
    # The piece's own generator, so that the backward can draw the same again.
    generator = torch.Generator().manual_seed((settings.seed + piece.start) % 2**63)
    return out.bernoulli_(1 - settings.dropout, generator=generator).div_(1 - settings.dropout)


class Inner:
    """In ATen's operations.

    Args:
        weights: in the dtype of the computation.
        rows: of the largest piece.
    """

    def __init__(self, settings: InnerSettings, weights: ExpertWeights, rows: int) -> None:
        self._settings, self._weights = settings, weights
        # Activation (or the SwiGLU gate's gradient), gradient, dropout's scale.
        count = 2 + (weights.gate_weight is not None) + bool(settings.dropout)
        shape = (count, rows, weights.fc1_weight.size(1))
        self._scratch = _cpu_memory.empty(shape, weights.fc1_weight)

    def forward(self, expert: int, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None) -> Tensor:
        """The second map's input, ``(P, F)``.

        Args:
            hidden, gate: what the first maps gave, without biases; overwritten by what ``backward`` wants.
            norm: mean and reciprocal deviation, ``(P,)``, which are written. The result lacks the latter.
        """
        _add(hidden, self._weights.fc1_bias, expert)
        _add(gate, self._weights.gate_bias, expert)
        inner = self._activated(piece, hidden, gate)
        if norm is not None and self._weights.layernorm_weight is not None:
            mean_P, rstd_P = norm
            torch.sum(inner, dim=1, dtype=mean_P.dtype, out=mean_P).div_(inner.size(1))
            # The variance of centred rows: a mean far larger than the deviation cancels nothing.
            inner.sub_(mean_P.unsqueeze(1))
            torch.linalg.vector_norm(inner, dim=1, dtype=rstd_P.dtype, out=rstd_P)
            rstd_P.square_().div_(inner.size(1)).add_(EPS).rsqrt_()
            inner.mul_(self._weights.layernorm_weight[expert])
        return inner

    def grad_buffer(self, rows: int) -> Tensor:
        """Where ``backward`` wants the gradient, ``(P, F)``."""
        return self._scratch[1, :rows]

    def backward(
        self, expert: int, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The activation (with a norm less its mean), the gradient of ``hidden``, and that of ``gate``.

        Args:
            hidden, gate: as ``forward`` left them.
            norm: mean, along and shift of ``NormedLinear.input_grad``, ``(P,)`` each.
        """
        grad = self.grad_buffer(len(hidden))
        inner = self._activated(piece, hidden, gate)
        if norm is not None and self._weights.layernorm_weight is not None:
            mean_P, along_P, shift_P = norm
            inner.sub_(mean_P.unsqueeze(1))
            # Two passes: one addcmul with two columns that broadcast would leave the vectorised path.
            grad.mul_(self._weights.layernorm_weight[expert])
            grad.addcmul_(inner, along_P.to(grad.dtype).unsqueeze(1), value=-1).sub_(shift_P.unsqueeze(1))
        if self._settings.dropout:
            grad.mul_(self._scratch[-1, : len(hidden)])
        gate_grad = None
        if gate is not None:
            gate_grad = torch.ops.aten.silu.out(hidden, out=self._scratch[2, : len(hidden)]).mul_(grad)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(gate), hidden, grad_input=grad)
        elif self._settings.activation == "gelu":
            torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
        else:
            torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
        return inner, grad, gate_grad

    def _activated(self, piece: slice, hidden: Tensor, gate: Tensor | None) -> Tensor:
        """Activation and dropout, whose scale stays in the last buffer."""
        inner = self._scratch[0, : len(hidden)]
        if gate is not None:
            torch.ops.aten.silu.out(hidden, out=inner).mul_(gate)
        elif self._settings.activation == "gelu":
            torch.ops.aten.gelu.out(hidden, out=inner)
        else:
            torch.clamp(hidden, min=0, out=inner)
        if self._settings.dropout:
            inner.mul_(dropout_scale(self._settings, piece, self._scratch[-1, : len(hidden)]))
        return inner


class FusedInner(Inner):
    """By the compiled kernels: bias, GELU and norm."""

    def __init__(self, settings: InnerSettings, weights: ExpertWeights, rows: int) -> None:
        super().__init__(settings, weights, rows)
        vectors = (weights.fc1_bias, weights.layernorm_weight)
        self._bias, self._norm_weight = (None if vector is None else vector.float() for vector in vectors)

    @staticmethod
    def applies(settings: InnerSettings, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this."""
        known = settings.activation == "gelu" and not settings.dropout and dtype in (torch.float32, torch.bfloat16)
        return known and kernels.load()

    def forward(self, expert: int, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None) -> Tensor:
        """As :class:`Inner`; ``hidden`` stays without its bias."""
        inner = self._scratch[0, : len(hidden)]
        mean_P, rstd_P = norm or (None, None)
        torch.ops.mhmoe_cpu.gelu_norm(hidden, *self._vectors(expert), inner, mean_P, rstd_P)
        return inner

    def backward(
        self, expert: int, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor, None]:
        """As :class:`Inner`."""
        inner, grad = self._scratch[0, : len(hidden)], self.grad_buffer(len(hidden))
        mean_P, along_P, shift_P = norm or (None, None, None)
        torch.ops.mhmoe_cpu.gelu_norm_backward(
            hidden, *self._vectors(expert), grad, inner, mean_P, along_P, shift_P
        )  # fmt: skip
        return inner, grad, None

    def _vectors(self, expert: int) -> Sequence[Tensor | None]:
        return [None if vectors is None else vectors[expert] for vectors in (self._bias, self._norm_weight)]


def inner_of(settings: InnerSettings, weights: ExpertWeights, rows: int) -> Inner:
    """The fastest that can do what is asked."""
    kind = FusedInner if FusedInner.applies(settings, weights.fc1_weight.dtype) else Inner
    return kind(settings, weights, rows)


def _add(rows: Tensor | None, bias: Tensor | None, expert: int) -> None:
    # addmm would first write the bias to all rows; here they are still in the cache.
    if rows is not None and bias is not None:
        rows.add_(bias[expert])

"""What an expert computes between its two linear maps, for one piece of its rows: bias, activation, dropout, norm.

:class:`Inner` does it in ATen's operations, :class:`FusedInner` in one pass each way where its kernels are built and
know the activation. Both write to buffers of their own, which the next piece overwrites.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._expert_network import ExpertWeights
from ..activations import ACTIVATIONS
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
    """In ATen's operations; an activation that none of them fits in autograd's, of one piece at a time.

    Args:
        rows: of the largest piece.
        hidden_RF: whose width and dtype the pieces have.
        has_backward: make room for gradients, too.
    """

    def __init__(self, settings: InnerSettings, rows: int, hidden_RF: Tensor, has_backward: bool) -> None:
        self._settings = settings
        # Activation, in the backward its gradient and that of a gate, dropout's scale.
        gated = ACTIVATIONS[settings.activation].is_gated
        count = 1 + has_backward * (1 + gated) + bool(settings.dropout)
        self._scratch = _cpu_memory.empty((count, rows, hidden_RF.size(1)), hidden_RF)

    def forward(
        self, weights: ExpertWeights, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> Tensor:
        """The second map's input, ``(P, F)``.

        Args:
            weights: one expert's, in the dtype of ``hidden``.
            hidden, gate: what the first maps gave, without biases; overwritten by what ``backward`` wants.
            norm: mean and reciprocal deviation, ``(P,)``, which are written. The result lacks the latter.
        """
        # addmm would first write the bias to all rows; here they are still in the cache.
        if weights.fc1_bias is not None:
            hidden.add_(weights.fc1_bias)
        if gate is not None and weights.gate_bias is not None:
            gate.add_(weights.gate_bias)
        inner = self._activated(piece, hidden, gate)
        if norm is not None and weights.layernorm_weight is not None:
            mean_P, rstd_P = norm
            torch.sum(inner, dim=1, dtype=mean_P.dtype, out=mean_P).div_(inner.size(1))
            # The variance of centred rows: a mean far larger than the deviation cancels nothing.
            inner.sub_(mean_P.unsqueeze(1))
            torch.linalg.vector_norm(inner, dim=1, dtype=rstd_P.dtype, out=rstd_P)
            rstd_P.square_().div_(inner.size(1)).add_(EPS).rsqrt_()
            inner.mul_(weights.layernorm_weight)
        return inner

    def grad_buffer(self, rows: int) -> Tensor:
        """Where ``backward`` wants the gradient, ``(P, F)``."""
        return self._scratch[1, :rows]

    def backward(
        self, weights: ExpertWeights, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The activation (with a norm less its mean), the gradient of ``hidden``, and that of ``gate``.

        Args:
            weights, hidden, gate: as ``forward`` left them.
            norm: mean, along and shift of ``NormedLinear.input_grad``, ``(P,)`` each.
        """
        grad = self.grad_buffer(len(hidden))
        inner = self._activated(piece, hidden, gate)
        if norm is not None and weights.layernorm_weight is not None:
            mean_P, along_P, shift_P = norm
            inner.sub_(mean_P.unsqueeze(1))
            # Two passes: one addcmul with two columns that broadcast would leave the vectorised path.
            grad.mul_(weights.layernorm_weight)
            grad.addcmul_(inner, along_P.to(grad.dtype).unsqueeze(1), value=-1).sub_(shift_P.unsqueeze(1))
        if self._settings.dropout:
            grad.mul_(self._scratch[-1, : len(hidden)])
        return inner, *self._activation_grads(grad, hidden, gate)

    def _activation_grads(self, grad: Tensor, hidden: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``hidden``, in place of the activation's, and of ``gate``."""
        kind = self._settings.activation
        if kind == "swiglu" and gate is not None:
            gate_grad = torch.ops.aten.silu.out(hidden, out=self._scratch[2, : len(hidden)]).mul_(grad)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(gate), hidden, grad_input=grad)
            return grad, gate_grad
        if kind == "gelu":
            return torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad), None
        if kind == "relu":
            return torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad), None
        grads = torch.func.vjp(ACTIVATIONS[kind].of, *_of_maps(hidden, gate))[1](grad)
        return grads[0], grads[1] if len(grads) > 1 else None

    def _activated(self, piece: slice, hidden: Tensor, gate: Tensor | None) -> Tensor:
        """Activation and dropout, whose scale stays in the last buffer."""
        inner = self._scratch[0, : len(hidden)]
        kind = self._settings.activation
        if kind == "swiglu" and gate is not None:
            torch.ops.aten.silu.out(hidden, out=inner).mul_(gate)
        elif kind == "gelu":
            torch.ops.aten.gelu.out(hidden, out=inner)
        elif kind == "relu":
            torch.clamp(hidden, min=0, out=inner)
        else:
            inner.copy_(ACTIVATIONS[kind].of(*_of_maps(hidden, gate)))
        if self._settings.dropout:
            inner.mul_(dropout_scale(self._settings, piece, self._scratch[-1, : len(hidden)]))
        return inner


class FusedInner(Inner):
    """By the compiled kernels: bias, GELU and norm."""

    @staticmethod
    def applies(settings: InnerSettings, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this."""
        known = settings.activation == "gelu" and not settings.dropout and dtype in (torch.float32, torch.bfloat16)
        return known and kernels.load()

    def forward(
        self, weights: ExpertWeights, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> Tensor:
        """As :class:`Inner`; ``hidden`` stays without its bias."""
        inner = self._scratch[0, : len(hidden)]
        mean_P, rstd_P = norm or (None, None)
        torch.ops.mhmoe_cpu.gelu_norm(hidden, *_vectors(weights), inner, mean_P, rstd_P)
        return inner

    def backward(
        self, weights: ExpertWeights, piece: slice, hidden: Tensor, gate: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor, None]:
        """As :class:`Inner`."""
        inner, grad = self._scratch[0, : len(hidden)], self.grad_buffer(len(hidden))
        mean_P, along_P, shift_P = norm or (None, None, None)
        torch.ops.mhmoe_cpu.gelu_norm_backward(
            hidden, *_vectors(weights), grad, inner, mean_P, along_P, shift_P
        )  # fmt: skip
        return inner, grad, None


def inner_of(settings: InnerSettings, rows: int, hidden_RF: Tensor, has_backward: bool) -> Inner:
    """The fastest that can do what is asked."""
    kind = FusedInner if FusedInner.applies(settings, hidden_RF.dtype) else Inner
    return kind(settings, rows, hidden_RF, has_backward)


def _of_maps(hidden: Tensor, gate: Tensor | None) -> list[Tensor]:
    return [hidden] if gate is None else [hidden, gate]


def _vectors(weights: ExpertWeights) -> Sequence[Tensor | None]:
    vectors = (weights.fc1_bias, weights.layernorm_weight)
    return [None if vector is None else vector.float().contiguous() for vector in vectors]

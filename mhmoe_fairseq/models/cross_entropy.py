"""Cross entropy of targets under a linear output layer, without log-probabilities of all rows at once.

Logits, their softmax in float32 and their gradients exist for one chunk of rows at a time. Where a loss is to be
differentiated, the gradients are computed with it, so that no product is computed twice: losses are nearly always
summed, and then their gradients need a common factor at most. Anything else computes the chunks again.
``torch.nn.functional.linear_cross_entropy`` (torch 2.14) does so for a sum only and not under autocast; on a CPU it is
slower, in bf16 slower than the plain way.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.cpu import kernels
from ..moe.modes import compute_dtype, eager_obstacle

# A chunk's logits in float32, about as much as a cache holds; but where a row takes so much that fewer than these rows
# fit, products would wait for the weight.
_CHUNK_BYTES = 32 * 2**20
_CHUNK_ROWS = 256
_NO_TARGET = -100  # PyTorch's own: no id is negative

Parts = tuple[Tensor, Tensor, Tensor | None]  # features (N, D), weight (V, D) and bias (V,)


class Prediction(NamedTuple):
    """What an output layer makes of targets, in their shape.

    Attributes:
        losses: cross entropy in nats, float32 (float64 of such features); 0 where ignored.
        is_best: whether the target is the most probable symbol, of several the first; False where ignored; None unless
            asked for.
    """

    losses: Tensor
    is_best: Tensor | None


class _How(NamedTuple):
    """The type of products, the target without a loss if there is one, whether to look for the most probable symbol."""

    dtype: torch.dtype
    ignored: int | None
    with_best: bool

    @property
    def wide(self) -> torch.dtype:
        """The type of softmax, losses and sums over rows."""
        return torch.promote_types(self.dtype, torch.float32)


def predict(
    features: Tensor, layer: nn.Linear, targets: Tensor, ignored: int | None = None, with_best: bool = False
) -> Prediction:
    """Return the cross entropy of every target, differentiable as often as wanted.

    Products are in autocast's type where it is on, the softmax in float32.

    Args:
        features: ``(..., D)``, of two dimensions at least.
        layer: ``D -> V``.
        targets: ``(...)`` ids.
        ignored: the target without a loss (default: all have one).
        with_best: look for ``is_best``, too, which takes a tenth of the time where there is no kernel for it.
    """
    parts = features.flatten(0, -2), layer.weight, layer.bias
    how = _How(compute_dtype(features), ignored, with_best)
    if eager_obstacle(parts):
        losses, is_best = _plain(parts, targets.flatten(), how)
    else:
        losses, is_best = _Predict.apply(*parts, targets.flatten(), how, torch.is_grad_enabled())
    return Prediction(losses.view(targets.shape), None if is_best is None else is_best.view(targets.shape))


def _plain(parts: Parts, targets_N: Tensor, how: _How) -> tuple[Tensor, Tensor | None]:
    """Losses and ``is_best`` of all rows at once, in autograd's operations."""
    logits = F.linear(*(None if part is None else part.to(how.dtype) for part in parts))  # type: ignore[arg-type]
    log_probs = logits.log_softmax(1, dtype=how.wide)
    ignored = _NO_TARGET if how.ignored is None else how.ignored
    losses = F.nll_loss(log_probs, targets_N, reduction="none", ignore_index=ignored)
    is_best = log_probs.argmax(1).eq(targets_N).logical_and(targets_N.ne(ignored)) if how.with_best else None
    return losses, is_best


class _Predict(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, how: _How, has_graph: bool
    ) -> tuple[Tensor, Tensor | None]:
        parts = x_ND, weight_VD, bias_V
        # In fp16 the gradients of unscaled losses would vanish: there they wait for the factor.
        needed = (
            ctx.needs_input_grad[:3]
            if has_graph and any(ctx.needs_input_grad[:3]) and how.dtype != torch.float16
            else None
        )
        losses_N, best_N, ctx.gradients = _in_chunks(parts, targets_N, how, needed)
        if has_graph:
            ctx.how = how
            ctx.save_for_backward(*parts, targets_N)
        if best_N is not None:
            ctx.mark_non_differentiable(best_N)
        return losses_N, best_N

    @staticmethod
    def backward(ctx: Any, factor_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *parts, targets_N = ctx.saved_tensors
        if torch.is_grad_enabled() or eager_obstacle([factor_N]):  # create_graph, or a batch of gradients
            given = [part for part in parts if part is not None]

            def losses(*given: Tensor) -> Tensor:
                return _plain((*given, None)[:3], targets_N, ctx.how)[0]  # type: ignore[arg-type]

            with torch.autocast(factor_N.device.type, enabled=False):
                gradients = torch.func.vjp(losses, *given)[1](factor_N)
            return *gradients, *[None] * (6 - len(given))
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or (len(factor_N) > 1 and factor_N.stride(0)):  # used up, or not a sum's factor
            gradients = _in_chunks(parts, targets_N, ctx.how, ctx.needs_input_grad[:3], factor_N)[2]
        else:
            gradients = [None if grad is None else grad.mul_(factor_N[:1].sum()) for grad in gradients]
        return *gradients, None, None, None


def _in_chunks(
    parts: Parts, targets_N: Tensor, how: _How, needed: tuple[bool, ...] | None, factor_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None, list[Tensor | None] | None]:
    """Losses, ``is_best``, and the gradients by the ``parts`` that are ``needed``, None for none; without a graph.

    Args:
        factor_N: of each loss in the sum whose gradients they are (default: 1).
    """
    # Only operations that write to given memory, whose types autocast leaves alone.
    x_ND, weight_VD, bias_V = (None if part is None else part.to(how.dtype) for part in parts)
    assert x_ND is not None and weight_VD is not None
    index_N, ignored_N = targets_N.contiguous(), None
    if how.ignored is not None:
        ignored_N = targets_N.eq(how.ignored)
        index_N = index_N.masked_fill(ignored_N, 0)
        factor_N = torch.ones_like(targets_N, dtype=how.wide) if factor_N is None else factor_N
        factor_N = factor_N.masked_fill(ignored_N, 0)
    losses_N = x_ND.new_empty(index_N.shape, dtype=how.wide)
    best_N = torch.empty_like(index_N, dtype=torch.bool) if how.with_best else None
    gradients = None if needed is None else _Gradients(parts, needed, how, x_ND, weight_VD)
    softmax = _fused_softmax if _has_kernel(x_ND) else _softmax
    for chunk, logits, wide in _buffers(x_ND, len(weight_VD), how):
        if bias_V is None:
            torch.mm(x_ND[chunk], weight_VD.t(), out=logits)
        else:
            torch.addmm(bias_V, x_ND[chunk], weight_VD.t(), out=logits)
        factors, is_best = (None if of is None else of[chunk] for of in (factor_N, best_N))
        rows = _Rows(index_N[chunk], factors, losses_N[chunk], is_best)
        grad = softmax(logits, wide, rows, gradients is not None)
        if gradients is not None:
            gradients.add(chunk, grad, logits)
    if ignored_N is not None:
        losses_N.masked_fill_(ignored_N, 0)
        if best_N is not None:
            best_N.masked_fill_(ignored_N, False)
    return losses_N, best_N, None if gradients is None else gradients.tensors()


class _Rows(NamedTuple):
    """Of a chunk's rows targets and factors of the gradient, and where losses and ``is_best`` are to be written."""

    targets: Tensor
    factors: Tensor | None
    losses: Tensor
    is_best: Tensor | None


def _softmax(logits_CV: Tensor, wide_CV: Tensor, rows: _Rows, with_gradient: bool) -> Tensor:
    """Write losses; return their gradient by the logits, or anything if there is to be none.

    Args:
        wide_CV: the logits' own memory, or some for them in the type of the losses.
    """
    if wide_CV is not logits_CV:
        wide_CV.copy_(logits_CV)
    # A CPU's kernel reads a whole row before it writes it.
    log_probs = torch.ops.aten._log_softmax.out(
        wide_CV, 1, False, out=wide_CV if wide_CV.is_cpu else torch.empty_like(wide_CV)
    )
    index_C1 = rows.targets[:, None]
    target_C1 = log_probs.gather(1, index_C1)
    torch.neg(target_C1[:, 0], out=rows.losses)
    if rows.is_best is not None:
        torch.eq(log_probs.argmax(1), rows.targets, out=rows.is_best)
    if not with_gradient:
        return log_probs
    grad = log_probs.exp_().scatter_(1, index_C1, target_C1.expm1_())  # p - 1, exact where p is near 1
    return grad if rows.factors is None else grad.mul_(rows.factors[:, None])


def _fused_softmax(logits_CV: Tensor, _: Tensor, rows: _Rows, with_gradient: bool) -> Tensor:
    """As :func:`_softmax`, by the compiled kernel: the gradient takes the logits' place."""
    factors = None if rows.factors is None else rows.factors.float().contiguous()
    torch.ops.mhmoe_cpu.cross_entropy(logits_CV, rows.targets, factors, with_gradient, rows.losses, rows.is_best)
    return logits_CV


def _has_kernel(x_ND: Tensor) -> bool:
    return x_ND.is_cpu and x_ND.dtype in (torch.float32, torch.bfloat16) and kernels.load()


def _buffers(x_ND: Tensor, num_symbols: int, how: _How) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a chunk, and memory for its logits and their softmax, which is one where it may be."""
    rows = max(_CHUNK_ROWS, _CHUNK_BYTES // (num_symbols * how.wide.itemsize))
    count = -(-len(x_ND) // rows)
    rows = -(-len(x_ND) // max(count, 1))  # chunks alike
    logits = x_ND.new_empty(rows, num_symbols)
    wide = logits if how.wide == how.dtype or _has_kernel(x_ND) else torch.empty_like(logits, dtype=how.wide)
    for start in range(0, len(x_ND), max(rows, 1)):
        chunk = slice(start, min(start + rows, len(x_ND)))
        some = logits[: chunk.stop - start]
        yield chunk, some, some if wide is logits else wide[: len(some)]


class _Gradients:
    """Gradients by features, weight and bias, summed chunk by chunk.

    Args:
        parts: of the result's types.
        needed: which of them.
        x_ND, weight_VD: in the type of the products.
    """

    def __init__(self, parts: Parts, needed: tuple[bool, ...], how: _How, x_ND: Tensor, weight_VD: Tensor) -> None:
        self._parts, self._x_ND, self._weight_VD = parts, x_ND, weight_VD
        self._sums = [
            None if part is None or not need else torch.empty_like(part, dtype=dtype)
            for part, need, dtype in zip(parts, needed, (how.dtype, how.wide, how.wide))
        ]
        _, weight_grad_VD, bias_grad_V = self._sums
        if bias_grad_V is not None:
            bias_grad_V.zero_()
        if weight_grad_VD is not None and not len(x_ND):
            weight_grad_VD.zero_()

    def add(self, chunk: slice, grad_CV: Tensor, scratch_CV: Tensor) -> None:
        """Add a chunk's share, from the gradient by its logits.

        Args:
            scratch_CV: memory in the type of the products.
        """
        x_ND, weight_VD, bias_V = self._sums
        if bias_V is not None:
            bias_V += grad_CV.sum(0, dtype=bias_V.dtype)
        rounded_CV = grad_CV if grad_CV.dtype == scratch_CV.dtype else scratch_CV.copy_(grad_CV)
        if x_ND is not None:
            torch.mm(rounded_CV, self._weight_VD, out=x_ND[chunk])
        if weight_VD is None:
            return
        begun = chunk.start > 0  # before, its memory holds anything
        if weight_VD.dtype == rounded_CV.dtype:
            weight_VD.addmm_(rounded_CV.t(), self._x_ND[chunk], beta=float(begun))
        else:
            product = torch.mm(rounded_CV.t(), self._x_ND[chunk], out=torch.empty_like(self._weight_VD))
            weight_VD.add_(product) if begun else weight_VD.copy_(product)

    def tensors(self) -> list[Tensor | None]:
        """Return them in the order and types of the parts."""
        pairs = zip(self._sums, self._parts)
        return [None if total is None or part is None else total.to(part.dtype) for total, part in pairs]

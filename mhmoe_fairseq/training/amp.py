"""fairseq's ``--amp``, which divides gradients by the loss scale twice."""

from typing import Any

from fairseq.optim.amp_optimizer import AMPOptimizer


def undo_one_unscaling(optimizer: Any) -> None:
    """Multiply the gradients of an ``AMPOptimizer`` by the loss scale, in front of its step; others' stay.

    It divides them where it clips, telling PyTorch's scaler of the inner optimizer, and once more in its step, telling
    it of the outer one, which the scaler takes for another. Adam would hardly notice, but its epsilon would then be as
    many times too large as the loss is scaled.
    """
    if isinstance(optimizer, AMPOptimizer):
        optimizer.fp32_optimizer.multiply_grads(optimizer.scaler.get_scale())

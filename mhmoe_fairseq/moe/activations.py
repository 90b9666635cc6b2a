"""What stands between the maps of an expert, by name: a new activation is an entry of ``ACTIVATIONS``.

A gated one takes the outputs of two maps, as GLU variants do (Shazeer, arXiv 2002.05202).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: "dict[str, Activation]" = {}
# What the lineage's flags and checkpoints call it, where it is not the name here.
BY_FLAG = {"silu": "swiglu"}

_LIMIT, _SLOPE = 7.0, 1.702  # of gpt-oss and MAGI-2


class Activation(NamedTuple):
    """An elementwise function of one map's output, or of two.

    Attributes:
        of: ``fc1(x)``, and of a gated one ``gate(x)``, to the input of ``fc2``, ``(..., F)`` each.
        num_kept: tensors of F features that autograd keeps for it and the last map, of one row.
        is_gated: whether there is a gate matrix.

    >>> ACTIVATIONS["relu"].of(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    of: Callable[..., Tensor]
    num_kept: int
    is_gated: bool = False


def swiglu(hidden: Tensor, gate: Tensor) -> Tensor:
    """``silu(hidden) * gate``.

    >>> swiglu(torch.tensor([20.0]), torch.tensor([-2.0]))
    tensor([-40.])
    """
    return F.silu(hidden) * gate


def swiglu7(hidden: Tensor, gate: Tensor) -> Tensor:
    """The clamped SwiGLU of gpt-oss and MAGI-2: no product grows beyond 7 x 8, and a gate of 0 lets pass.

    >>> swiglu7(torch.tensor([20.0]), torch.tensor([-20.0])), swiglu7(torch.tensor([5.0]), torch.tensor([0.0]))
    (tensor([-41.9997]), tensor([4.9990]))
    """
    hidden, gate = hidden.clamp(max=_LIMIT), gate.clamp(-_LIMIT, _LIMIT)
    return hidden * (_SLOPE * hidden).sigmoid() * (gate + 1)


ACTIVATIONS.update(
    gelu=Activation(F.gelu, num_kept=2),
    relu=Activation(F.relu, num_kept=1),
    swiglu=Activation(swiglu, num_kept=4, is_gated=True),
    swiglu7=Activation(swiglu7, num_kept=7, is_gated=True),
)

"""BitNet b1.58 (Ma et al., arXiv 2402.17764): matrices of -1, 0 and 1 with one scale each, inputs of eight bits.

In training the matrices stay as they are, latent, and every forward pass rounds them anew; gradients pass the rounding
as if it were the identity, also where it clips. All rounding is done in float32 at least, whatever autocast says, half
to even.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from .modes import compute_dtype, in_forward_mode, widened, without_autocast

_SMALLEST = 1e-5  # of a scale
_BLOCKS = 4  # numbers of two bits in a byte
_SCALE = "_scale"


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each matrix's -1, 0 and 1, ``(..., rows, columns)``, and what they are multiplied by, ``(..., 1, 1)``.

    >>> ternary(torch.tensor([[0.1, -0.5], [0.9, 0.02]]))
    (tensor([[ 0., -1.],
            [ 1.,  0.]]), tensor([[0.3800]]))
    """
    wide = widened(weight.detach())
    scale = wide.abs().mean((-2, -1), keepdim=True).clamp(min=_SMALLEST)
    return (wide / scale).round().clamp(-1, 1) + 0.0, scale  # no -0.


def quantize_weight(weight: Tensor) -> Tensor:
    """The matrices that a forward pass multiplies by, in float32 at least; its gradient is the latent matrices'.

    >>> quantize_weight(torch.tensor([[0.1, -0.5], [0.9, 0.02]]))
    tensor([[ 0.0000, -0.3800],
            [ 0.3800,  0.0000]])
    """
    values, scale = ternary(weight)
    return _straight_through(widened(weight), values * scale)


def quantize_activation(x: Tensor) -> Tensor:
    """Every row, of the last dimension, in steps of a 127th of its largest number; its gradient passes unchanged.

    >>> quantize_activation(torch.tensor([1.0, -2.0, 0.5, 0.0])) * 63.5
    tensor([  64., -127.,   32.,    0.])
    """
    wide = widened(x)
    fixed = wide.detach()
    scale = 127 / fixed.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    return _straight_through(wide, (fixed * scale).round().clamp(-128, 127) / scale).to(x.dtype)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, to the last bit, with the derivatives of ``x``."""
    if not torch.is_grad_enabled() and not in_forward_mode():
        return rounded
    return rounded + (x - x.detach())


def pack(values: Tensor) -> Tensor:
    """Four of -1, 0, 1 in a byte, uint8 ``(..., rows / 4, columns)``, as Hugging Face's BitNet has them.

    Rows are taken in four equal blocks; bits 2i and 2i + 1 of byte r are, plus one, the value of row r of block i.

    >>> pack(torch.tensor([0, -1, 1, 1, 0, -1, 1, 0]).view(8, 1)).view(-1)
    tensor([153,  72], dtype=torch.uint8)
    """
    blocks = (values + 1).to(torch.uint8).unflatten(-2, (_BLOCKS, -1)).unbind(-3)
    return sum((block << 2 * index for index, block in enumerate(blocks[1:], 1)), start=blocks[0])


def unpack(packed: Tensor) -> Tensor:
    """What :func:`pack` packed, in float32.

    >>> unpack(torch.tensor([[153], [72]], dtype=torch.uint8)).view(-1)
    tensor([ 0., -1.,  1.,  1.,  0., -1.,  1.,  0.])
    """
    blocks = torch.stack([packed >> 2 * index & 3 for index in range(_BLOCKS)], dim=-3)
    return blocks.flatten(-3, -2).float() - 1


class TernaryWeights(nn.Module):
    """Among a module's bases: its matrices ``ternary_names`` are ternary in the forward pass.

    They may be *fixed*, rounded once and for all, as for a model that will not train any more: nothing is computed for
    them then, and ``state_dict`` has them packed, uint8 under their names with ``NAME_scale`` beside them. Loading
    such a state fixes them; what cannot be done any more is training, in which the latent numbers would move.

    >>> layer = TernaryLinear(2, 4, bias=False)
    >>> layer.fix_weights()
    >>> {name: (value.dtype, tuple(value.shape)) for name, value in layer.state_dict().items()}
    {'weight': (torch.uint8, (1, 2)), 'weight_scale': (torch.float32, (1,))}
    """

    ternary_names: tuple[str, ...] = ()
    is_fixed = False

    def ternary_weight(self, weight: Tensor) -> Tensor:
        """One of the matrices as the forward pass needs it; ``UserError`` in training where they are fixed."""
        if not self.is_fixed:
            return quantize_weight(weight)
        if self.training:
            raise UserError("packed 1.58-bit weights cannot be trained: start from the checkpoint that they are from")
        return weight

    def fix_weights(self) -> None:
        """Round the matrices in place, for good."""
        for name in () if self.is_fixed else self.ternary_names:
            weight = getattr(self, name)
            values, scale = ternary(weight)
            weight.data = (values * scale).to(weight.dtype)
        self.is_fixed = bool(self.ternary_names)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.ternary_names if self.is_fixed else ():
            weight = destination[prefix + name].detach()
            scale = widened(weight).abs().amax((-2, -1), keepdim=True)
            destination[prefix + name] = pack(weight.sign())
            destination[prefix + name + _SCALE] = scale.flatten()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = [name for name in self.ternary_names if prefix + name in state_dict]
        packed = [name for name in loaded if state_dict[prefix + name].dtype == torch.uint8]
        for name in packed:
            values = unpack(state_dict[prefix + name])
            scale = state_dict.pop(prefix + name + _SCALE, None)
            if scale is None:
                raise UserError(f"{prefix}{name} is packed, but there is no {prefix}{name}{_SCALE} beside it")
            state_dict[prefix + name] = values * scale.view(*values.shape[:-2], 1, 1)
        if loaded:
            self.is_fixed = bool(packed)
        super()._load_from_state_dict(state_dict, prefix, *args)


def packed_state(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """A model's state with the matrices of these names packed.

    Raises:
        UserError: for a matrix whose rows are no multiple of four.

    >>> packed_state({"weight": torch.eye(4), "bias": torch.ones(4)}, ["weight"])["weight"]
    tensor([[ 86,  89, 101, 149]], dtype=torch.uint8)
    """
    packed = dict(state)
    for name in names:
        rows = state[name].size(-2)
        if rows % _BLOCKS:
            raise UserError(f"{name} has {rows} rows: packed are matrices with a multiple of {_BLOCKS}")
        values, scale = ternary(state[name])
        packed[name], packed[name + _SCALE] = pack(values), scale.flatten()
    return packed


def packed_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of a state's packed matrices.

    >>> packed_names(packed_state({"weight": torch.eye(4)}, ["weight"]))
    ['weight']
    """
    return [name for name in state if name + _SCALE in state]


def without_packing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of a state that was not packed; packed matrices become tensors without values.

    >>> without_packing(packed_state({"weight": torch.eye(4)}, ["weight"]))
    {'weight': tensor(..., device='meta', size=(4, 4))}
    """
    packed = packed_names(state)
    shapes = {name: (*state[name].shape[:-2], _BLOCKS * state[name].size(-2), state[name].size(-1)) for name in packed}
    whole = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    scales = {name + _SCALE for name in packed}
    return {name: whole.get(name, value) for name, value in state.items() if name not in scales}


def ternary_names(model: nn.Module) -> list[str]:
    """The names of all matrices of a model that are ternary in its forward pass.

    >>> ternary_names(nn.Sequential(nn.Linear(4, 4), TernaryLinear(4, 4)))
    ['1.weight']
    """
    parts = ((prefix, part) for prefix, part in model.named_modules() if isinstance(part, TernaryWeights))
    return [f"{prefix}.{name}".lstrip(".") for prefix, part in parts for name in part.ternary_names]


class TernaryLinear(TernaryWeights, nn.Linear):
    """``nn.Linear`` with a ternary weight and its input in eight bits, row by row; a bias stays as it is.

    >>> layer = TernaryLinear(2, 2, bias=False)
    >>> _ = layer.load_state_dict({"weight": torch.tensor([[0.1, -0.5], [0.9, 0.02]])})
    >>> layer(torch.tensor([1.0, 2.0])).detach()  # 1.0 is the 64th of 127 steps to 2.0
    tensor([-0.7600,  0.3830])
    """

    ternary_names = ("weight",)

    @classmethod
    def of(cls, linear: nn.Linear) -> "TernaryLinear":
        """A map with the parameters of another."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in) -> (..., out)``, in the dtype that autocast asks for."""
        dtype = compute_dtype(x)
        with without_autocast(x.device.type):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(quantize_activation(x).to(dtype), self.ternary_weight(self.weight).to(dtype), bias)

"""What autograd holds between a forward and a backward pass, measured."""

import math

import torch
from moe_oracle import losses_of
from torch import Tensor, nn


def kept_bytes_of(model: nn.Module, tokens: Tensor, *, backward: bool = False) -> int:
    """Bytes of all storages that autograd holds after the forward pass and the loss, parameters left out.

    Under autocast rounded copies of weights are held, too; the plan counts them as parameters, so they are left out.
    """
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1}
    weights = shapes | {shape[::-1] if len(shape) == 2 else (shape[0], *shape[:0:-1]) for shape in shapes}
    weights |= {(shape[0], math.prod(shape[1:])) for shape in shapes}  # as merged experts take them
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and tuple(tensor.shape) not in weights:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, tokens)
    if backward:
        loss.backward()
    return sum(storage.nbytes() for storage in held.values())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """As the criterion: cross entropy, and the balance losses."""
    losses, extra = model(tokens, targets=tokens)
    return losses.sum() + losses_of(extra).sum()

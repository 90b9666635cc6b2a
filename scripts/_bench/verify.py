"""Before anything is timed: the contenders compute the same function."""

from __future__ import annotations

import torch
from torch import Tensor

from .contenders import SEED, OurLayer, Step
from .mixtral import build_mixtral
from .plain_loop import PlainLoop
from .setting import Setting

TOLERANCE = 1e-5


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|, the project's definition."""
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value - reference).abs().max() / scale).item()


def check(errors: dict[str, float], what: str) -> float:
    """The largest error.

    Raises:
        RuntimeError: it exceeds the tolerance; a speed comparison would mean nothing.
    """
    name, worst = max(errors.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{what}: relative error of {name} is {worst:.2e}, the limit is {TOLERANCE:.0e}")
    return worst


def loop_errors(setting: Setting) -> dict[str, float]:
    """Relative error of our layer against the plain loop: output, balance loss and every gradient."""
    torch.manual_seed(SEED)
    ours = Step(OurLayer(setting.config()), setting)
    loop = Step(PlainLoop(setting), setting)
    loop.module.copy_from(ours.module.layer)
    (hidden, balance), (hidden_loop, balance_loop) = ours(), loop()
    errors = {
        "output": relative_error(hidden, hidden_loop),
        "balance loss": relative_error(balance, balance_loop),
        "gradient of the input": relative_error(ours.x.grad, loop.x.grad),
    }
    gradients = {name: parameter.grad for name, parameter in ours.module.layer.named_parameters()}
    for name, parts in loop.module.named_like_ours().items():
        reference = torch.stack([part.grad for part in parts])
        errors[f"gradient of {name}"] = relative_error(gradients[name].view_as(reference), reference)
    return errors


def mixtral_errors(setting: Setting) -> dict[str, float]:
    """Relative error of our SwiGLU layer against the Mixtral block with the same weights."""
    torch.manual_seed(SEED)
    ours = Step(OurLayer(setting.swiglu_config()), setting)
    block = Step(build_mixtral(setting, "eager"), setting)
    block.module.copy_from(ours.module.layer)
    return {"output": relative_error(ours()[0], block()[0])}

"""Everything the benchmark runs, each as a step: one forward and one backward pass.

Every module here maps x ``(T, D)`` to ``(hidden (T, D), balance_loss or None)`` and has the same two
``D x D`` projections, so that a comparison compares how the experts are run and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

from .gemm_bound import GemmBound
from .mixtral import build_mixtral, has_transformers
from .plain_loop import PlainLoop
from .setting import BALANCE_WEIGHT, Setting
from .static_xmoe import build_static_xmoe, has_torchscale

SEED = 1


class OurLayer(nn.Module):
    """:class:`MHMoELayer` with the return value the benchmark expects."""

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.layer = MHMoELayer(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.layer(x)
        return output.hidden, output.balance_loss


class Step:
    """One training step of a module, without the optimiser; gradients start from None as after ``zero_grad``."""

    def __init__(self, module: nn.Module, setting: Setting) -> None:
        self.module = module.to(setting.torch_dtype)
        self.parameters = list(module.parameters())
        self.x, self.grad = make_batch(setting)

    def tensors(self) -> list[Tensor]:
        """What exists before and after a step."""
        return [*self.parameters, *self.module.buffers(), self.x, self.grad]

    def clear(self) -> None:
        """Forget every gradient."""
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        self.clear()
        hidden, balance = self.module(self.x)
        if balance is None:
            hidden.backward(self.grad)
        else:
            weight = torch.full_like(balance, BALANCE_WEIGHT)
            torch.autograd.backward((hidden, balance), (self.grad, weight))
        return hidden, balance


def make_batch(setting: Setting) -> tuple[Tensor, Tensor]:
    """The input, a leaf that wants a gradient as inside a network, and the gradient of the output."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (setting.tokens, setting.embed_dim)
    x = torch.randn(shape, generator=generator).to(setting.torch_dtype).requires_grad_()
    return x, torch.randn(shape, generator=generator).to(setting.torch_dtype)


def _ours(setting: Setting) -> nn.Module:
    return OurLayer(setting.config())


def _ours_swiglu(setting: Setting) -> nn.Module:
    return OurLayer(setting.swiglu_config())


def _loop(setting: Setting) -> nn.Module:
    return PlainLoop(setting)


def _mixtral_grouped(setting: Setting) -> nn.Module:
    return build_mixtral(setting, "grouped_mm")


def _mixtral_eager(setting: Setting) -> nn.Module:
    return build_mixtral(setting, "eager")


BUILDERS: dict[str, Callable[[Setting], nn.Module]] = {
    "mhmoe": _ours,
    "mhmoe-swiglu": _ours_swiglu,
    "loop": _loop,
    "torchscale": build_static_xmoe,
    "mixtral-grouped": _mixtral_grouped,
    "mixtral-eager": _mixtral_eager,
}
NAMES = {
    "mhmoe": "MH-MoE (ours)",
    "mhmoe-swiglu": "MH-MoE (ours), SwiGLU",
    "gemm": "GEMM bound",
    "loop": "plain autograd loop",
    "torchscale": "TorchScale static X-MoE",
    "mixtral-grouped": "Hugging Face Mixtral, grouped_mm",
    "mixtral-eager": "Hugging Face Mixtral, eager loop",
}


def unavailable(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == "torchscale" and not has_torchscale():
        return "torchscale is not installed"
    if name.startswith("mixtral") and not has_transformers():
        return "transformers is not installed (pip install transformers)"
    return None


def build(name: str, setting: Setting) -> Callable[[], object]:
    """The named contender, ready to be called: one call is one forward and backward pass.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"contender ({name}) must be one of {', '.join(NAMES)}")
    torch.manual_seed(SEED)
    if name == "gemm":
        return GemmBound(setting.config(), setting.tokens, setting.torch_dtype)
    return Step(BUILDERS[name](setting), setting)

"""fairseq's Adam on PyTorch's fused kernel: an update reads and writes weights, gradients and moments once."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor, nn
from torch.optim.adamw import adamw

logger = logging.getLogger(__name__)

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, torch.float64, *_HALVES)
_DEVICES = ("cpu", "cuda")


class FusedAdam(Adam):
    """fairseq's Adam, of which the kernel computes what it can take; the state is fairseq's, key for key.

    fairseq adds eps to the root of the second moment before its bias correction, the kernel after it: the kernel gets
    ``eps / sqrt(1 - beta2 ** t)``. Weights in half precision are computed in float32 and rounded, as fairseq does.
    The rest (sparse gradients, other dtypes and devices, strides) takes fairseq's own step.
    """

    param_groups: list[dict[str, Any]]
    factor: float | Tensor = 1.0  # what gradients are still to be multiplied by: the kernel does it on the way

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, and return what ``closure`` returns."""
        loss = None if closure is None else closure()
        with torch.no_grad():
            self._step_without_kernel()
            for group in self.param_groups:
                alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
                for parameter in filter(_has_gradient, group["params"]):
                    if _kernel_takes(group, parameter):
                        count = self._started(parameter)["step"]
                        # One by one in half precision: a copy in float32 is made of each.
                        alone = id(parameter) if parameter.dtype in _HALVES else None
                        alike[parameter.device, parameter.dtype, count, alone].append(parameter)
                for members in alike.values():
                    self._step_with_kernel(group, members)
        self.factor = 1.0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, and the factor that they were to be multiplied by."""
        super().zero_grad(set_to_none)
        self.factor = 1.0

    def multiplies_gradients(self) -> bool:
        """Return whether the next step can multiply all gradients by ``factor``: the kernel does it in float32."""
        return all(
            parameter.dtype == torch.float32 and _kernel_takes(group, parameter)
            for group in self.param_groups
            for parameter in filter(_has_gradient, group["params"])
        )

    def _has_factor(self) -> bool:
        return isinstance(self.factor, Tensor) or self.factor != 1.0

    def _started(self, parameter: nn.Parameter) -> dict[str, Any]:
        """A parameter's state, as fairseq begins and keeps it: a count of updates and moments in float32 or wider."""
        state = self.state[parameter]
        dtype = _computed_in(parameter.dtype)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        for key in ("exp_avg", "exp_avg_sq"):  # loaded ones may lie elsewhere
            state[key] = state[key].to(parameter.device, dtype).contiguous()
        return state

    def _step_with_kernel(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update parameters of one device, dtype and number of updates."""
        states = [self.state[parameter] for parameter in parameters]
        device, dtype = parameters[0].device, _computed_in(parameters[0].dtype)
        before = states[0]["step"]
        weights = [parameter.detach().to(dtype) for parameter in parameters]
        scale = (torch.ones((), device=device) / self.factor).float() if self._has_factor() else None
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [_gradient(parameter).to(dtype) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(torch.full((len(states),), float(before), device=device).unbind()),
            fused=True,
            grad_scale=scale,  # which the kernel divides by
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"] / math.sqrt(1 - beta2 ** (before + 1)),
            maximize=False,
        )
        for parameter, weight, state in zip(parameters, weights, states):
            state["step"] = before + 1
            if parameter.dtype in _HALVES:
                parameter.copy_(weight)

    def _step_without_kernel(self) -> None:
        """Let fairseq's step update what the kernel cannot take."""
        groups = self.param_groups
        rest = [
            {**group, "params": [p for p in filter(_has_gradient, group["params"]) if not _kernel_takes(group, p)]}
            for group in groups
        ]
        left = [parameter for group in rest for parameter in group["params"]]
        if not left:
            return
        if not getattr(self, "_told", False):
            self._told = True
            kinds = sorted({_kind(parameter) for parameter in left})
            logger.debug(f"{len(left)} parameters take fairseq's own Adam step, not the fused one: {', '.join(kinds)}")
        if self._has_factor():
            for parameter in left:
                _gradient(parameter).mul_(self.factor)
        self.param_groups = rest
        try:
            super().step()
        finally:
            self.param_groups = groups


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALVES else dtype


def _kernel_takes(group: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Whether the kernel computes fairseq's rule for a parameter that has a gradient; on a CPU it ignores strides."""
    gradient = _gradient(parameter)
    return (
        type(parameter) in (nn.Parameter, Tensor)
        and type(gradient) is Tensor
        and parameter.dtype in _DTYPES
        and parameter.device.type in _DEVICES
        and (gradient.dtype, gradient.device) == (parameter.dtype, parameter.device)
        and gradient.layout == parameter.layout == torch.strided
        and parameter.is_contiguous()
        and gradient.is_contiguous()
        and not group.get("amsgrad", False)
        and all(0 <= beta < 1 for beta in group["betas"])
    )


def _kind(parameter: nn.Parameter) -> str:
    gradient = _gradient(parameter)
    layout = "sparse" if gradient.layout != torch.strided else f"strides {parameter.stride()}, {gradient.stride()}"
    return f"{type(parameter).__name__} of {parameter.dtype} on {parameter.device}, {layout}"

"""What flows into and out of every module of a model, kept with its gradients."""

import functools
from typing import Any

from torch import Tensor, nn


class ModuleFlow:
    """Filled by each forward pass, overwritten by the next.

    Attributes:
        inputs: name -> the positional arguments of the module's latest call.
        outputs: name -> its result.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.inputs[name], self.outputs[name] = args, output

    def into(self, name: str) -> Tensor:
        """The first argument."""
        return self.inputs[name][0]

    def out_of(self, name: str) -> Any:
        """The result."""
        return self.outputs[name]

    def evaluated(self, name: str, module: nn.Module, **kwargs: Any) -> "ModuleFlow":
        """What flows when the module runs in evaluation on the same arguments; nothing here changes."""
        kept = self.inputs, self.outputs
        entered, mode = self.inputs[name], module.training
        self.inputs, self.outputs = {}, {}
        module.eval()(*entered, **kwargs)
        module.train(mode)
        again = ModuleFlow(nn.Module())
        again.inputs, again.outputs = self.inputs, self.outputs
        self.inputs, self.outputs = kept
        return again

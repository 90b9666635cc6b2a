"""Every public function and class of the layer has an example, and the examples say what happens."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from mhmoe_fairseq import moe
from mhmoe_fairseq.moe.dispatch import plan_dispatch
from mhmoe_fairseq.moe.gate import Gate

NAMES = [info.name for info in pkgutil.iter_modules(moe.__path__) if info.name != "cpu" and info.name[0] != "_"]
# What the examples need beside the names of their own module.
KNOWN = {name: getattr(moe, name) for name in moe.__all__}
KNOWN |= {"torch": torch, "Gate": Gate, "plan_dispatch": plan_dispatch}


def documented(module: ModuleType) -> Iterator[Any]:
    """The public functions and classes that a module defines, but for protocols."""
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        is_protocol = getattr(value, "_is_protocol", False)
        if is_own and (inspect.isfunction(value) or inspect.isclass(value)) and not is_protocol:
            yield value


@pytest.mark.parametrize("name", ["", *NAMES, "_fields"])
def test_examples_are_right_and_nothing_is_without(name: str) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(f"mhmoe_fairseq.moe.{name}".rstrip("."))
    missing = [value.__name__ for value in documented(module) if ">>>" not in (value.__doc__ or "")]
    assert name == "_fields" or not missing, f"without an example: {', '.join(missing)}"
    result = doctest.testmod(module, extraglobs=KNOWN, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed

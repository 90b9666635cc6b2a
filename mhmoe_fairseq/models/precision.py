"""What a model computes in, and the one rule by which ``--mhmoe-precision auto`` chooses it.

The rule asks for instructions, not for a trial run, so that it says the same every time on one machine: bf16 where
something multiplies it in hardware, float32 elsewhere. On a GPU that is compute capability 8.0 or later; on a processor
oneDNN, PyTorch's library for such products, and one of ``INSTRUCTIONS``. Products in bf16 then run at 2 (avx512_bf16)
to 10 times (AMX) the rate of float32's; without them every number is widened first, which is slower than float32.
"""

import contextlib
import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.errors import UserError
from ..moe.experts import ExpertFFN
from ..moe.quantize import TernaryWeights
from ..moe.router import Router
from ..torchscale_ext.static_xmoe import StaticXMoE

logger = logging.getLogger(__name__)

AUTO = "auto"
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")  # the fastest first, as torch.cpu names them; two of Arm
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fast_bf16(device_type: str) -> str | None:
    """Returns what multiplies bf16 on this machine's ``cpu`` or ``cuda`` device; None where it is slower than float32.

    >>> fast_bf16("cpu") in (None, *INSTRUCTIONS)
    True
    """
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return "compute capability {}.{}".format(*capability) if capability >= (8, 0) else None
    if not torch.backends.mkldnn.is_available():
        return None
    found = _instructions()
    return next((name for name in INSTRUCTIONS if found.get(name)), None)


def _instructions() -> Mapping[str, Any]:
    """What the processor can do, by the names of PyTorch's cpuinfo; early releases tell of two instructions only."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {"amx_bf16": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def device_type_of(options: Any) -> str:
    """Returns where fairseq puts a model of these options: ``cuda`` if there is one and ``--cpu`` is not given."""
    return "cuda" if torch.cuda.is_available() and not getattr(options, "cpu", False) else "cpu"


def resolve(precision: Any, device_type: str) -> str:
    """Returns ``fp32``, ``bf16`` or ``fp16`` for a value of ``--mhmoe-precision``; None, not given, is ``fp32``."""
    if str(precision) == AUTO:
        return "fp32" if fast_bf16(device_type) is None else "bf16"
    return str(precision or "fp32")


@functools.cache
def _tell(precision: str, device_type: str) -> None:
    """Logs, once in a process, what models compute in; a slow choice is warned of."""
    fast = fast_bf16(device_type) if precision == "bf16" else None
    if precision == "bf16" and fast is None:
        logger.warning(
            f"--mhmoe-precision bf16: this {'GPU' if device_type == 'cuda' else 'processor'} does not multiply bf16 "
            "itself, which is slower than float32: give --mhmoe-precision auto, or fp32"
        )
    else:
        logger.info(f"computing in {precision}" + (f" ({fast})" if fast else ""))


def require_one_precision(precision: Any) -> None:
    """Ends with a ``UserError`` a training on several machines for which ``auto`` stands for different types.

    Every process must call it; ``precision`` is its own.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, resolve(precision, "cpu"))
    if len(set(found)) > 1:
        ranks = ", ".join(f"{name} on rank {found.index(name)}" for name in dict.fromkeys(found))
        raise UserError(
            f"--mhmoe-precision must be one for all processes, but their machines differ ({ranks}): give fp32 or bf16 "
            f"in place of {AUTO}"
        )


class ComputePrecision(nn.Module):
    """Stands among a module's bases: computes under autocast in the type that ``--mhmoe-precision`` names.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        scales_loss: the trainer scales the loss, as fp16 needs.
    """

    def set_precision(self, options: Any) -> None:
        """Reads the options, once in the constructor, and logs what they come to; a slow choice is warned of."""
        device_type = device_type_of(options)
        self.precision = resolve(options.mhmoe_precision, device_type)
        self.scales_loss = bool(options.amp or options.fp16)
        if torch.get_default_device().type != "meta":  # a plan computes nothing
            _tell(self.precision, device_type)

    def make_generation_fast_(self, **kwargs: Any) -> None:
        """fairseq's call for a model that will not train any more: rounds weights to what it computes in, once.

        In half precision autocast would round them in every step. Norms, routers and embeddings stay as they are.
        Ternary weights become so for good, in any precision.
        """
        parent = getattr(super(), "make_generation_fast_", None)
        if parent is not None:
            parent(**kwargs)
        for module in self.modules():
            if isinstance(module, TernaryWeights):
                module.fix_weights()
        if self.precision in _AUTOCAST_DTYPES:
            self.round_weights(_AUTOCAST_DTYPES[self.precision])

    def round_weights(self, dtype: torch.dtype) -> None:
        """Rounds the weights of the layers' maps and experts, in place."""
        raise NotImplementedError

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager:
        """The model's precision, for calling a part by itself, such as the output layer.

        Raises:
            UserError: when training in fp16 without loss scaling.
        """
        if self.precision == "fp32":
            return contextlib.nullcontext()
        if self.precision == "fp16" and self.training and torch.is_grad_enabled() and not self.scales_loss:
            raise UserError(
                "--mhmoe-precision fp16: training in fp16 needs loss scaling: add --amp or --fp16, or take bf16"
            )
        return torch.autocast(device_type, dtype=_AUTOCAST_DTYPES[self.precision])


def round_linear_maps(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights of what computes under autocast anyway: linear maps and experts, in place; float32 ones alone.

    The maps' results stay the same; experts with few rows, as in a step of decoding, read their weights as they are.
    """
    if isinstance(module, (Router, StaticXMoE)):  # compute in float32, or as TorchScale does
        return
    if isinstance(module, nn.Linear):
        weights: list[Tensor | None] = [module.weight, module.bias]
    elif isinstance(module, ExpertFFN):
        weights = [module.fc1_weight, module.gate_weight, module.fc2_weight]
    else:
        weights = []
        for child in module.children():
            round_linear_maps(child, dtype)
    for weight in weights:
        if weight is not None and weight.dtype == torch.float32:
            weight.data = weight.data.to(dtype)

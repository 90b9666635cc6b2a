"""The precision of ``--mhmoe-precision``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..common.errors import UserError

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ComputePrecision:
    """Among a module's bases: computing under autocast in the type that the options name.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        scales_loss: the trainer scales the loss, as fp16 needs.
    """

    training: bool

    def set_precision(self, options: Any) -> None:
        """Read the options, once in the constructor."""
        self.precision = str(options.mhmoe_precision or "fp32")
        self.scales_loss = bool(options.amp or options.fp16)

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager:
        """The precision of ``--mhmoe-precision``, for calling a part by itself, such as the output layer.

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

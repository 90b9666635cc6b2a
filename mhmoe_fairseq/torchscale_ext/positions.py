"""Positions: rotary for attention, sinusoidal and learned tables for the embedding.

None of the computed tables is saved: checkpoints hold parameters only and are the same bytes for the same training.
"""

import math

import torch
from torch import Tensor, nn

from ..common.errors import UserError


class RotaryPositions(nn.Module):
    """Rotate pairs of neighbouring features of queries and keys by an angle linear in the position.

    The product of a query and a key then depends on the distance alone (Su et al., 2021).
    The table grows when a longer sequence comes.
    """

    turns: Tensor  # (S, d/2, 2): of each pair, as real and imaginary part

    def __init__(self, dim: int, max_positions: int) -> None:
        super().__init__()
        if dim % 2:
            raise UserError(f"--rotary-embed needs an even width per attention head, not {dim}")
        self.dim = dim
        self._fill(max_positions, device=None)

    @torch.inference_mode(False)  # grown while generating, it serves later training
    def _fill(self, length: int, device: torch.device | None) -> None:
        frequency = 10000.0 ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("turns", torch.stack((angle.cos(), angle.sin()), dim=-1), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Rotate ``(..., S, d)``, whose features lie side by side, as the positions ``offset .. offset + S - 1``."""
        end = offset + x.size(-2)
        if end > self.turns.size(0):
            self._fill(2 * end, x.device)
        # One complex product reads neighbours together: on a CPU up to eight times as fast as four real ones.
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
        turns = torch.view_as_complex(self.turns[offset:end].to(wide))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class SinusoidalPositions(nn.Module):
    """The values of fairseq's sinusoidal embedding for right-padded rows, from a table that is not saved."""

    FIRST = 2  # fairseq counts from padding_idx + 1
    table: Tensor

    def __init__(self, dim: int, max_positions: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise UserError(f"sinusoidal positions need an even --decoder-embed-dim of at least 4, not {dim}")
        self.dim = dim
        self._fill(max_positions, device=None)

    @torch.inference_mode(False)
    def _fill(self, length: int, device: torch.device | None) -> None:
        half = self.dim // 2
        step = math.log(10000) / (half - 1)
        frequency = torch.exp(torch.arange(half, device=device, dtype=torch.float32) * -step)
        angle = torch.arange(self.FIRST, self.FIRST + length, device=device, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("table", torch.cat((angle.sin(), angle.cos()), dim=1), persistent=False)

    def forward(self, tokens: Tensor, incremental_state: dict | None = None) -> Tensor:
        """``(B, S)`` tokens -> ``(1, S, D)``; the caller takes the last column in incremental decoding."""
        length = tokens.size(1)
        if length > self.table.size(0):
            self._fill(2 * length, tokens.device)
        return self.table[None, :length]


class LearnedPositions(nn.Module):
    """One trained vector per position.

    Raises:
        UserError: at a sequence longer than the table.
    """

    def __init__(self, dim: int, max_positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, tokens: Tensor, incremental_state: dict | None = None) -> Tensor:
        """``(B, S)`` tokens -> ``(1, S, D)``; the caller takes the last column in incremental decoding."""
        length = tokens.size(1)
        if length > self.weight.size(0):
            raise UserError(
                f"{length} tokens are more than the {self.weight.size(0)} learned positions (--max-target-positions)"
            )
        return self.weight[None, :length]

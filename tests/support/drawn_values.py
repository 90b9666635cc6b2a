"""What a parameter's initial values should be, and statistics that tell whether they are."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Values(NamedTuple):
    """What a parameter's values should be.

    Attributes:
        kind: ``uniform`` in +-size, ``normal`` with deviation size, ``constant``, or ``orthogonal``: rows of one
            length, size, and at right angles where they can be.
        size: as the kind says.
        zero_row: the row of zeros that an embedding has for padding.
    """

    kind: str
    size: float
    zero_row: int | None = None


def uniform(fan_in: float) -> Values:
    """``nn.Linear``'s and ``nn.Conv2d``'s own."""
    return Values("uniform", fan_in**-0.5)


def xavier(width: int, gain: float) -> Values:
    return Values("uniform", gain * math.sqrt(6 / (2 * width)))


ONES, ZEROS = Values("constant", 1.0), Values("constant", 0.0)


def assert_follows(name: str, values: Tensor, expected: Values) -> None:
    """The values of the parameter ``name`` are as ``expected`` says."""
    values = values.detach()
    if expected.zero_row is not None:
        assert not values[expected.zero_row].any(), name
        values = torch.cat([values[: expected.zero_row], values[expected.zero_row + 1 :]])
    try:
        if expected.kind == "constant":
            assert torch.equal(values, torch.full_like(values, expected.size))
        elif expected.kind == "orthogonal":
            assert_orthogonal(values, expected.size)
        else:
            assert_drawn(values, expected)
    except AssertionError as error:
        raise AssertionError(f"{name} {tuple(values.shape)} should be {expected}: {error}") from error


def assert_drawn(values: Tensor, expected: Values) -> None:
    """Mean, mean square and extremes, within five standard deviations of what independent draws have."""
    values = values.detach().double().flatten()
    n, size = values.numel(), expected.size
    square, spread = {"uniform": (size**2 / 3, math.sqrt(0.8)), "normal": (size**2, math.sqrt(2))}[expected.kind]
    assert abs(values.mean()) <= 5 * math.sqrt(square / n)
    assert abs(values.square().mean() / square - 1) <= 5 * spread / math.sqrt(n)
    largest = values.abs().max() / size
    if expected.kind == "uniform":
        assert 1 - 15 / n <= largest <= 1 + 1e-6
    elif n >= 300:
        assert largest > 2.2  # a uniform of the same deviation ends at 1.73


def assert_orthogonal(rows: Tensor, length: float) -> None:
    rows = rows.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.full((rows.size(0),), length))
    if rows.size(0) <= rows.size(1):
        torch.testing.assert_close(rows @ rows.T, length**2 * torch.eye(rows.size(0)), atol=1e-5, rtol=0)

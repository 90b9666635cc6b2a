"""Rotary, sinusoidal and learned positions."""

import pytest
import torch
from fairseq.modules import SinusoidalPositionalEmbedding

from mhmoe_fairseq.torchscale_ext.positions import LearnedPositions, RotaryPositions, SinusoidalPositions


def test_sinusoidal_equals_fairseqs_on_right_padded_rows():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 1]])
    theirs = SinusoidalPositionalEmbedding(16, padding_idx=1, init_size=32)(tokens)
    ours = SinusoidalPositions(16, max_positions=8)(tokens).expand_as(theirs)
    real = tokens.ne(1)
    torch.testing.assert_close(ours[real], theirs[real])


def test_computed_tables_are_not_saved():
    assert SinusoidalPositions(16, 8).state_dict() == {}
    assert RotaryPositions(8, 16).state_dict() == {}


def test_rotary_against_complex_numbers():
    rotary = RotaryPositions(8, max_positions=16)
    x = torch.randn(2, 3, 5, 8)
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angle = torch.arange(2, 7)[:, None] * frequency
    turned = torch.view_as_complex(x.view(2, 3, 5, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotary(x, offset=2), torch.view_as_real(turned).flatten(-2))


def test_rotary_scores_depend_on_the_distance_only():
    rotary = RotaryPositions(8, max_positions=64).double()
    q, k = torch.randn(1, 8, dtype=torch.double), torch.randn(1, 8, dtype=torch.double)
    score = [(rotary(q, offset=o + 3) * rotary(k, offset=o)).sum() for o in (0, 7, 40)]
    torch.testing.assert_close(score[0], score[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score[0], score[2], rtol=1e-6, atol=1e-6)
    other = (rotary(q, offset=5) * rotary(k, offset=0)).sum()
    assert (other - score[0]).abs() > 1e-3


@pytest.mark.parametrize("kind", ["rotary", "sinusoidal"])
def test_tables_grow(kind):
    if kind == "rotary":
        x = torch.randn(1, 20, 8)
        torch.testing.assert_close(RotaryPositions(8, 4)(x), RotaryPositions(8, 20)(x))
    else:
        tokens = torch.full((1, 20), 5)
        torch.testing.assert_close(SinusoidalPositions(8, 4)(tokens), SinusoidalPositions(8, 20)(tokens))


@pytest.mark.parametrize("positions", [RotaryPositions(8, 4), SinusoidalPositions(8, 4)])
def test_tables_that_grew_while_generating_serve_training(positions):
    is_rotary = isinstance(positions, RotaryPositions)
    x = torch.randn(1, 20, 8, requires_grad=True)
    with torch.inference_mode():
        positions(x if is_rotary else torch.full((1, 20), 5))
    (positions(x) if is_rotary else x * positions(torch.full((1, 20), 5))).sum().backward()
    assert x.grad.abs().sum() > 0


def test_learned_positions_end_with_their_table():
    learned = LearnedPositions(8, max_positions=4)
    assert torch.equal(learned(torch.full((2, 3), 5)), learned.weight[None, :3])
    with pytest.raises(ValueError, match=r"5 tokens are more than the 4 learned positions \(--max-target-positions\)"):
        learned(torch.full((1, 5), 5))


def test_widths_that_cannot_be_rotated():
    with pytest.raises(ValueError, match="--rotary-embed needs an even width per attention head, not 3"):
        RotaryPositions(3, 4)
    with pytest.raises(ValueError, match="--decoder-embed-dim"):
        SinusoidalPositions(7, 4)

"""Which patches and tokens are masked: exact numbers, allowed places, and shares."""

import math

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

from mhmoe_fairseq.data.multimodal import masking
from mhmoe_fairseq.data.multimodal.masking import block_mask, check_fraction, mask_index, mask_text, masked_count


@pytest.fixture(scope="module")
def dictionary():
    words = Dictionary()
    for number in range(50):
        words.add_symbol(f"w{number}")
    words.add_symbol("<mask>")
    return words


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (3, 7), (1, 9), (1, 1)])
def test_exactly_as_many_patches_as_asked_for(grid):
    size = grid[0] * grid[1]
    for number in {0, 1, size // 3, masked_count(size, 0.4), size - 1, size}:
        for seed in range(20):
            mask = block_mask(grid, number, rng(seed))
            assert mask.shape == (size,) and mask.dtype == torch.bool and int(mask.sum()) == number
    with pytest.raises(ValueError, match=rf"num_masked \({size + 1}\) must be between 0 and {size}"):
        block_mask(grid, size + 1, rng(0))


def test_forty_per_cent_of_beits_grid():
    assert masked_count(196, 0.4) == 78
    assert [masked_count(size, 0.15) for size in (0, 1, 3, 10, 50)] == [0, 1, 1, 2, 8]
    assert masked_count(3, 0.99) == 3


def test_masks_are_blocks():
    """Two masked patches in a row are far more frequent than where single patches are masked."""

    def neighbours(mask: np.ndarray) -> int:
        return int((mask[:, 1:] & mask[:, :-1]).sum() + (mask[1:] & mask[:-1]).sum())

    blocks = [neighbours(block_mask((14, 14), 78, rng(seed)).view(14, 14).numpy()) for seed in range(30)]
    scattered = []
    for seed in range(30):
        mask = np.zeros(196, dtype=bool)
        mask[rng(seed).choice(196, 78, replace=False)] = True
        scattered.append(neighbours(mask.reshape(14, 14)))
    assert np.mean(blocks) > 1.4 * np.mean(scattered)


def smallest_is(monkeypatch: pytest.MonkeyPatch, patches: int, grid: tuple[int, int]) -> None:
    monkeypatch.setattr(masking, "_SMALLEST_BLOCK", patches)
    monkeypatch.setattr(masking, "_BEIT_PATCHES", math.prod(grid))


def test_the_first_block_is_a_rectangle_of_allowed_shape(monkeypatch):
    """With as many patches as the smallest block has, that block is all there is."""
    smallest_is(monkeypatch, 36, (20, 20))
    monkeypatch.setattr(masking, "ASPECT", (1.0, 1.0))
    for seed in range(50):
        mask = block_mask((20, 20), 36, rng(seed)).view(20, 20).numpy()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert len(rows) == len(columns) == 6 and mask.sum() == 36
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("grid, smallest", [((14, 14), 16), ((28, 28), 64), ((7, 7), 4), ((2, 2), 1)])
def test_the_smallest_block_is_beits_share_of_the_grid(grid, smallest, monkeypatch):
    number = masked_count(grid[0] * grid[1], 0.4)
    masks = [block_mask(grid, number, rng(seed)) for seed in range(20)]
    smallest_is(monkeypatch, smallest, grid)
    assert all(torch.equal(block_mask(grid, number, rng(seed)), mask) for seed, mask in enumerate(masks))


def test_blocks_are_as_often_tall_as_wide_and_aspects_uniform_in_the_logarithm():
    free = np.zeros((60, 60), dtype=bool)
    blocks = [masking._fitting_block(free, 600, rng(seed)) for seed in range(900)]
    aspects = np.log([(rows.stop - rows.start) / (columns.stop - columns.start) for rows, columns in blocks])
    widest = math.log(1 / 0.3)
    assert 0.9 * widest < aspects.max() < 1.1 * widest and 0.9 * widest < -aspects.min() < 1.1 * widest
    assert abs(aspects.mean()) < 0.1 and abs(aspects.std() - widest / math.sqrt(3)) < 0.05


def test_every_patch_is_masked_now_and_then_and_no_side_is_preferred():
    shares = torch.stack([block_mask((8, 8), 26, rng(seed)) for seed in range(1000)]).float().mean(0).view(8, 8)
    assert float(shares.min()) > 0.08 and float(shares.max()) < 0.75  # corners less than the middle, as in BEiT
    for turned in (shares.flip(0), shares.flip(1), shares.T):
        assert float((shares - turned).abs().max()) < 0.09


def test_one_seed_one_mask():
    assert torch.equal(block_mask((8, 8), 26, rng(3, 1)), block_mask((8, 8), 26, rng(3, 1)))
    assert not torch.equal(block_mask((8, 8), 26, rng(3, 1)), block_mask((8, 8), 26, rng(3, 2)))


def text(*ids: int, pads: int = 0) -> torch.Tensor:
    return torch.tensor([0, *ids, 2, *[1] * pads])


@pytest.mark.parametrize("masks_end", [False, True])
@pytest.mark.parametrize("fraction", [0.15, 0.5, 0.7, 0.99])
def test_targets_are_at_masked_places_only(dictionary, fraction, masks_end):
    tokens = text(*range(10, 30), pads=3)
    maskable = 21 if masks_end else 20
    seen_end = 0
    for seed in range(200):
        masked, targets = mask_text(tokens, fraction, dictionary, rng(seed), masks_end=masks_end)
        is_target = targets != 1
        assert int(is_target.sum()) == masked_count(maskable, fraction)
        assert torch.equal(targets[is_target], tokens[is_target])
        assert torch.equal(masked[~is_target], tokens[~is_target])
        assert not is_target[0] and not is_target[-3:].any()
        seen_end += int(is_target[21])
    assert (seen_end > 0) == masks_end


def test_shares_of_mask_word_and_same(dictionary):
    tokens = text(*[10] * 2000)
    masked, targets = mask_text(tokens, 0.5, dictionary, rng(0))
    chosen = masked[targets != 1]
    counts = {
        "mask": int((chosen == mask_index(dictionary)).sum()),
        "same": int((chosen == 10).sum()),
        "word": int(((chosen != 10) & (chosen != mask_index(dictionary))).sum()),
    }
    assert len(chosen) == 1000
    assert abs(counts["mask"] - 800) < 50 and abs(counts["word"] - 98) < 35 and abs(counts["same"] - 102) < 35


def test_words_are_never_special(dictionary):
    tokens = text(*[10] * 5000)
    masked, _ = mask_text(tokens, 0.99, dictionary, rng(0))
    words = set(masked[1:-1].tolist())
    assert min(words) == dictionary.nspecial == 4 and max(words) == mask_index(dictionary)
    assert words >= set(range(4, 54))


def test_against_a_slow_reference(dictionary):
    """The same draws, token by token."""
    tokens = text(*range(10, 40), pads=2)
    masked, targets = mask_text(tokens, 0.5, dictionary, rng(7))
    draws = rng(7)
    places = [place for place, token in enumerate(tokens.tolist()) if token not in (0, 1, 2)]
    chosen = draws.permutation(places)[:15].tolist()
    uniform, words = draws.random(15), draws.integers(4, 54, size=15)
    expected, predicted = tokens.tolist(), [1] * len(tokens)
    for number, place in enumerate(chosen):
        predicted[place] = int(tokens[place])
        if uniform[number] < 0.8:
            expected[place] = mask_index(dictionary)
        elif uniform[number] < 0.9:
            expected[place] = int(words[number])
    assert masked.tolist() == expected and targets.tolist() == predicted


def test_a_text_without_words(dictionary):
    masked, targets = mask_text(text(), 0.5, dictionary, rng(0))
    assert masked.tolist() == [0, 2] and targets.tolist() == [1, 1]
    masked, targets = mask_text(text(), 0.5, dictionary, rng(0), masks_end=True)
    assert targets.tolist() == [1, 2]
    _, targets = mask_text(text(9), 0.15, dictionary, rng(0))
    assert targets.tolist() == [1, 9, 1]  # at least one


def test_the_tokens_given_stay(dictionary):
    tokens = text(*range(10, 30))
    before = tokens.clone()
    mask_text(tokens, 0.99, dictionary, rng(0))
    assert torch.equal(tokens, before)


def test_no_mask_symbol_and_bad_fractions():
    with pytest.raises(ValueError, match="the dictionary has no <mask>"):
        mask_index(Dictionary())
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"--text-mask-prob \(.*\) must be more than 0 and less than 1"):
            check_fraction(fraction, "--text-mask-prob")

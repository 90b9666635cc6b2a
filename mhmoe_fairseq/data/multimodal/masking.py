"""What masked data modelling hides: blocks of patches of an image, tokens of a text.

Every draw comes from a generator that the caller gives, so that a mask is the same in whatever process it is made.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UserError

if TYPE_CHECKING:
    from fairseq.data import Dictionary

MASK_SYMBOL = "<mask>"
ASPECT = (0.3, 1 / 0.3)  # height of a block in widths
_SMALLEST_BLOCK, _BEIT_PATCHES = 16, 196  # BEiT: blocks of at least 16 of 14 x 14 patches
_TRIES = 10
_REPLACED_BY_MASK, _REPLACED_BY_WORD = 0.8, 0.1


def block_mask(grid: tuple[int, int], num_masked: int, rng: np.random.Generator) -> Tensor:
    """Mask exactly ``num_masked`` patches, in rectangles as far as these fit, as BEiT masks them.

    Rectangles of random area, aspect and position are added as long as they bring no more patches than are missing;
    where ten in a row do not fit, single patches make up the number.

    Args:
        grid: rows and columns of patches.

    Returns:
        ``(rows * columns,)`` bool, row by row.

    Raises:
        ValueError: if there are fewer patches than shall be masked.
    """
    rows, columns = grid
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(f"num_masked ({num_masked}) must be between 0 and {rows * columns}, all {rows} x {columns}")
    mask = np.zeros(grid, dtype=bool)
    missing = num_masked
    while missing and (block := _fitting_block(mask, missing, rng)) is not None:
        missing -= int((~mask[block]).sum())
        mask[block] = True
    free = np.flatnonzero(~mask.ravel())
    mask.ravel()[rng.choice(free, missing, replace=False)] = True
    return torch.from_numpy(mask.ravel())


def _fitting_block(mask: np.ndarray, missing: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """A rectangle with at least one and at most ``missing`` free patches, or None after ten that have not."""
    rows, columns = mask.shape
    min_patches = max(1, rows * columns * _SMALLEST_BLOCK // _BEIT_PATCHES)
    for _ in range(_TRIES):
        area = rng.uniform(min_patches, max(min_patches, missing))
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < height <= rows and 0 < width <= columns):
            continue
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        block = slice(top, top + height), slice(left, left + width)
        if 0 < (~mask[block]).sum() <= missing:
            return block
    return None


def masked_count(size: int, fraction: float) -> int:
    """Return how many of ``size`` patches or tokens are masked: nearest to the fraction, at least one of any."""
    return min(size, max(1, math.floor(size * fraction + 0.5)))


def check_fraction(fraction: float, flag: str) -> None:
    """``UserError`` naming ``flag`` unless ``fraction`` leaves something masked and something seen."""
    if not 0 < fraction < 1:
        raise UserError(f"{flag} ({fraction}) must be more than 0 and less than 1")


def mask_index(dictionary: "Dictionary") -> int:
    """Return the id of ``<mask>``; ``UserError`` if the dictionary has none."""
    if MASK_SYMBOL not in dictionary:
        raise UserError(
            f"the dictionary has no {MASK_SYMBOL}: make dict.txt with mhmoe prepare image-text, or add a last line "
            f"'{MASK_SYMBOL} 0'"
        )
    return dictionary.index(MASK_SYMBOL)


def mask_text(
    tokens: Tensor, fraction: float, dictionary: "Dictionary", rng: np.random.Generator, *, masks_end: bool = False
) -> tuple[Tensor, Tensor]:
    """Hide ``fraction`` of a text's tokens, at least one: 80 % become ``<mask>``, 10 % another word, 10 % stay.

    ``<s>`` and padding are never masked, ``</s>`` only with ``masks_end``, as in captioning, where its prediction is
    what ends a caption. Other words are drawn uniformly from all that are neither special nor ``<mask>``.

    Args:
        tokens: ``(S,)`` with ``<s>`` and ``</s>``.

    Returns:
        ``(S,)`` masked tokens and ``(S,)`` targets: the token where it is masked, padding elsewhere. A text without a
        token that may be masked has no target.
    """
    never = [dictionary.bos(), dictionary.pad(), *([] if masks_end else [dictionary.eos()])]
    maskable = np.flatnonzero(~np.isin(tokens.numpy(), never))
    chosen = rng.permutation(maskable)[: masked_count(len(maskable), fraction)]
    draws = rng.random(len(chosen))
    mask = mask_index(dictionary)
    words = rng.integers(dictionary.nspecial, len(dictionary) - 1, size=len(chosen))
    words += words >= mask
    masked, targets = tokens.clone(), torch.full_like(tokens, dictionary.pad())
    targets[chosen] = tokens[chosen]
    masked[chosen[draws < _REPLACED_BY_MASK]] = mask
    is_word = (draws >= _REPLACED_BY_MASK) & (draws < _REPLACED_BY_MASK + _REPLACED_BY_WORD)
    masked[chosen[is_word]] = torch.from_numpy(words[is_word])
    return masked, targets

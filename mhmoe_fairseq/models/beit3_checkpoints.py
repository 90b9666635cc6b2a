"""A checkpoint of BEiT-3 fitted to a model of other sizes: position tables, heads."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..torchscale_ext.settings import UNUSED_POSITIONS
from .heads import start_new_head

logger = logging.getLogger(__name__)

IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"
TEXT_POSITIONS = "beit3.encoder.embed_positions.B.weight"
IMAGE_HEAD = "image_head."
# Before the patches: the unused rows and the class token's.
_FIRST_PATCH = UNUSED_POSITIONS + 1


def fit_state(model: nn.Module, state: dict[str, Any], new_heads: Iterable[str], prefix: str = "") -> None:
    """Change a state dictionary in place into one that ``model`` can load.

    The image's position table is resized to the model's grid of patches, the text's cut to the model's length; the
    head of masked patches is left out if the model has none; a head in ``new_heads`` that the checkpoint lacks keeps
    its initial weights.

    Args:
        model: an ``MHMoEBEiT3``.
        state: a state dictionary whose names start with ``prefix``; its tensors are not changed.
        new_heads: names of heads that the checkpoint may lack.

    Raises:
        UserError: if the checkpoint's texts were shorter than the model's.
    """
    for name, fit in ((IMAGE_POSITIONS, resize_image_positions), (TEXT_POSITIONS, cut_text_positions)):
        saved = state.get(prefix + name)
        if saved is not None:
            state[prefix + name] = fit(saved, model.get_parameter(name).size(0))
    if not any(name.startswith(IMAGE_HEAD) for name, _ in model.named_parameters()):
        for name in [name for name in state if name.startswith(prefix + IMAGE_HEAD)]:
            del state[name]
    for head in new_heads:
        start_new_head(model.heads[head], head, state, f"{prefix}heads.{head}.")


def drop_other_heads(model: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Remove from a state dictionary, in place, the heads that ``model`` has not: another task's.

    Args:
        model: an ``MHMoEBEiT3``.
        state: a state dictionary whose names start with ``prefix``; its tensors are not changed.
    """
    prefix += "heads."
    found = {name: name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)}
    others = {name: head for name, head in found.items() if head not in model.heads}
    for name in others:
        del state[name]
    for head in sorted(set(others.values())):
        logger.info(f"the checkpoint's head {head!r} is another task's: it is left out")


def resized_tables(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int, int]]:
    """The position tables of a state dictionary that are not of the model's size.

    Args:
        model: an ``MHMoEBEiT3``.

    Yields:
        the flag that sets the size, what it counts, how many the dictionary has and how many the model.
    """
    for name, flag, unit, others in (
        (IMAGE_POSITIONS, "--img-size", "patches", _FIRST_PATCH),
        (TEXT_POSITIONS, "--max-text-length", "tokens", UNUSED_POSITIONS),
    ):
        rows = model.get_parameter(name).size(0)
        if name in state and state[name].size(0) != rows:
            yield flag, unit, state[name].size(0) - others, rows - others


def resize_image_positions(table: Tensor, rows: int) -> Tensor:
    """Bicubically, as BEiT does; the class token's row is kept. ``(rows', D) -> (rows, D)``.

    Raises:
        UserError: if the table's rows do not fit a square of patches.
    """
    if table.size(0) == rows:
        return table
    before, after = (math.isqrt(size - _FIRST_PATCH) for size in (table.size(0), rows))
    if before**2 != table.size(0) - _FIRST_PATCH:
        raise UserError(f"{IMAGE_POSITIONS}: {table.size(0)} rows are not the positions of a square of patches")
    logger.info(f"positions of {before}x{before} patches are resized to {after}x{after} (--img-size)")
    grid = table[_FIRST_PATCH:].float().t().reshape(1, -1, before, before)
    resized = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:_FIRST_PATCH], resized.flatten(2)[0].t().to(table.dtype)])


def cut_text_positions(table: Tensor, rows: int) -> Tensor:
    """The first ``rows`` of a longer table.

    Raises:
        UserError: if it is shorter: nothing has been learnt for the rest.
    """
    if table.size(0) < rows:
        raise UserError(
            f"--max-text-length ({rows - UNUSED_POSITIONS}): the checkpoint has positions for "
            f"{table.size(0) - UNUSED_POSITIONS} tokens only"
        )
    return table[:rows]

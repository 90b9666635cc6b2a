"""Checkpoints for evaluation whose 1.58-bit weights take two bits each (docs/checkpoints.md has the layout)."""

from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..models.architectures import stored_options
from ..models.counts import blank_dictionary, build_on_meta
from ..moe.quantize import packed_names, packed_state, ternary_names
from .files import OPTIMIZER_STATE, read_checkpoint
from .summary import weights_of

_WORDS = 8  # of a dictionary: no ternary weight depends on it


def pack_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint of a model that ``--mhmoe-quantize`` makes ternary, its weights packed, without optimizer state.

    Raises:
        UserError: for a model without such weights, and one that is packed.
    """
    checkpoint = read_checkpoint(path)
    weights = weights_of(checkpoint, path)
    if packed_names(weights):
        raise UserError(f"{path} is packed")
    settings = (checkpoint.get("cfg") or {}).get("model") or {}
    if not settings.get("_name"):
        raise UserError(f"{path} has no configuration of fairseq, which tells of --mhmoe-quantize")
    names = ternary_names(build_on_meta(stored_options(settings), blank_dictionary(_WORDS)))
    if not names:
        raise UserError(f"{path}: a model without --mhmoe-quantize (experts or all) has no 1.58-bit weights")
    kept = {name: value for name, value in checkpoint.items() if name not in ("model", OPTIMIZER_STATE)}
    return {**kept, "model": packed_state(weights, names)}

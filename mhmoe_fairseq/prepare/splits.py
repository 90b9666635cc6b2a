"""Which document goes to which part: by document, by a fixed seed, measured in bytes."""

from __future__ import annotations

import random
from typing import Mapping, NamedTuple, Optional, Sequence

from ..common.errors import UserError

SPLITS = ("train", "valid", "test")
_FAR, _SLACK = 2, 0.02  # a part's share is far from what was asked when it is twice or half of it, and more
_OVERSHOOT = 1.1  # a held-out part may pass its share by this factor, so that one huge document cannot swallow it


class DocumentSize(NamedTuple):
    """Size of one document in UTF-8 bytes, and the split its source prescribes, if any."""

    num_bytes: int
    split: Optional[str] = None


def check_fractions(valid_fraction: float, test_fraction: float) -> None:
    """``UserError`` unless both shares are in [0, 1) and leave something to train on."""
    for flag, value in (("--valid-fraction", valid_fraction), ("--test-fraction", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"{flag} {value:g}: must be at least 0 and below 1")
    if valid_fraction + test_fraction >= 1:
        raise UserError(
            f"--valid-fraction {valid_fraction:g} and --test-fraction {test_fraction:g}: their sum must be below 1, "
            "the rest is the training part"
        )


def unlike_shares(sizes: Mapping[str, int], *, valid_fraction: float, test_fraction: float) -> Optional[str]:
    """A sentence about parts that are far from their shares, or None: documents are never divided between parts.

    Args:
        sizes: bytes of every part.
    """
    total = sum(sizes.values())
    asked = {"valid": valid_fraction, "test": test_fraction}
    asked["train"] = 1 - valid_fraction - test_fraction
    found = {split: size / total for split, size in sizes.items()} if total else {}
    if all(found[split] <= _FAR * asked[split] + _SLACK and _FAR * found[split] >= asked[split] - _SLACK
           for split in found):  # fmt: skip
        return None
    parts = ", ".join(f"{split} {share:.1%} for {asked[split]:.1%}" for split, share in found.items())
    return (
        f"the parts are far from their shares of the bytes ({parts}), since documents are never divided between them: "
        "give more or shorter documents, or say with --document-separator where they end"
    )


def assign_splits(
    sizes: Sequence[DocumentSize], *, valid_fraction: float, test_fraction: float, seed: int
) -> list[str]:
    """Assigns every document to ``train``, ``valid`` or ``test``.

    Documents are visited in an order drawn from ``seed``; a held-out part takes them until it has its share of the
    bytes. Splits prescribed by the source are kept as they are, and then no fraction applies.

    Raises:
        UserError: no documents, or fewer documents than parts.
    """
    if not sizes:
        raise UserError("--source: the corpus is empty after cleaning")
    if any(size.split for size in sizes):
        prescribed = [size.split or "train" for size in sizes]
        if "train" not in prescribed:
            raise UserError("--source: its training part is empty after cleaning")
        return prescribed
    shares = {"test": test_fraction, "valid": valid_fraction}
    wanted = [split for split, share in shares.items() if share > 0]
    if len(sizes) <= len(wanted):
        raise UserError(
            f"--source: {len(sizes)} document(s) cannot be split by document into train, {' and '.join(wanted[::-1])}: "
            "give more documents, another --document-separator (line, if every line is one), or --valid-fraction 0 / "
            "--test-fraction 0"
        )
    total = sum(size.num_bytes for size in sizes)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    assigned = ["train"] * len(sizes)
    for position, split in enumerate(wanted):
        free = [index for index in order if assigned[index] == "train"]
        for index in _fill(sizes, free, shares[split] * total, reserve=len(wanted) - position):
            assigned[index] = split
    return assigned


def _fill(sizes: Sequence[DocumentSize], free: list[int], target: float, reserve: int) -> list[int]:
    """Documents of ``free``, in order, up to ``target`` bytes: at least one, and ``reserve`` are left over."""
    most = len(free) - reserve
    taken: list[int] = []
    filled = 0
    for index in free:
        if filled >= target or len(taken) >= most:
            break
        if filled + sizes[index].num_bytes <= _OVERSHOOT * target:
            taken.append(index)
            filled += sizes[index].num_bytes
    return taken or [min(free, key=lambda index: sizes[index].num_bytes)]

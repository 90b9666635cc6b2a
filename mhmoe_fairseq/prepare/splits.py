"""Which document goes to which part: drawn by a fixed seed and measured in bytes, or by a hash of a unit's name."""

import hashlib
import random
from typing import Mapping, NamedTuple, Optional, Sequence

from ..common.errors import UserError

SPLITS = ("train", "valid", "test")
_FAR, _SLACK = 2, 0.02  # a part's share is far from what was asked when it is twice or half of it, and more
_OVERSHOOT = 1.1  # a held-out part may pass its share by this factor, so that one huge document cannot swallow it


class DocumentSize(NamedTuple):
    """Size of one document in UTF-8 bytes, the split its source prescribes, if any, and its domain, if it has one."""

    num_bytes: int
    split: Optional[str] = None
    domain: Optional[str] = None


def unlike_shares(sizes: Mapping[str, int], shares: Mapping[str, float]) -> Optional[str]:
    """Returns a sentence about parts whose sizes in bytes are far from their shares, if there are any."""
    total = sum(sizes.values())
    found = {split: size / total for split, size in sizes.items()} if total else {}
    if all((shares[split] - _SLACK) / _FAR <= found[split] <= shares[split] * _FAR + _SLACK for split in found):
        return None
    parts = ", ".join(f"{split} {share:.1%} for {shares[split]:.1%}" for split, share in found.items())
    return (
        f"the parts are far from their shares of the bytes ({parts}), since documents are never divided between them: "
        "give more or shorter documents, or say with --document-separator where they end"
    )


def assign_splits(sizes: Sequence[DocumentSize], shares: Mapping[str, float], seed: int) -> list[str]:
    """Returns the split of every document; each domain is divided for itself.

    Documents are visited in an order drawn from ``seed``; a held-out part takes them until it has its share of the
    bytes. Splits prescribed by the source are kept as they are, and then no share applies.

    Raises:
        UserError: no documents, or of a domain fewer documents than parts.
    """
    if not sizes:
        raise UserError("--source: the corpus is empty after cleaning")
    assigned = ["train"] * len(sizes)
    for domain in dict.fromkeys(size.domain for size in sizes):
        inside = [index for index, size in enumerate(sizes) if size.domain == domain]
        for index, split in zip(inside, _assign([sizes[index] for index in inside], shares, seed)):
            assigned[index] = split
    return assigned


def _assign(sizes: Sequence[DocumentSize], shares: Mapping[str, float], seed: int) -> list[str]:
    if any(size.split for size in sizes):
        prescribed = [size.split or "train" for size in sizes]
        if "train" not in prescribed:
            raise UserError("--source: its training part is empty after cleaning")
        return prescribed
    wanted = [split for split in ("test", "valid") if shares[split] > 0]
    if len(sizes) <= len(wanted):
        of, parts = f" of {sizes[0].domain}" if sizes[0].domain else "", " and ".join(wanted[::-1])
        raise UserError(
            f"--source: {len(sizes)} document(s){of} cannot be split by document into train, {parts}: "
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
    taken: list[int] = []
    filled = 0
    for index in free:
        if filled >= target or len(taken) >= len(free) - reserve:
            break
        if filled + sizes[index].num_bytes <= _OVERSHOOT * target:
            taken.append(index)
            filled += sizes[index].num_bytes
    return taken or [min(free, key=lambda index: sizes[index].num_bytes)]


def position(seed: int, purpose: str, name: str) -> float:
    """Returns a number in [0, 1), uniform over names, drawn from ``seed`` for one ``purpose``."""
    digest = hashlib.blake2b(f"{seed}\n{purpose}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(unit: str, seed: int, shares: Mapping[str, float]) -> str:
    """Returns the split of a unit: the same one in every language, whichever languages are prepared."""
    drawn = position(seed, "split", unit)
    if drawn < shares["test"]:
        return "test"
    return "valid" if drawn < shares["test"] + shares["valid"] else "train"

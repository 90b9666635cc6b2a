"""Which domain every document is of: ``domains.json`` beside the binarised text, of which no digest depends.

``{"train": "brown bible brown ...", "valid": "bible ..."}``: of each split with documents of several domains the domain
of each, in order. A split of one domain bears its name: ``valid_brown``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.files import read_json, write_json

FILE = "domains.json"


def write_domains(path: Path, documents: Mapping[str, Sequence[str]]) -> None:
    """Write the domain of each document of every split; no name has a space."""
    write_json(path, {split: " ".join(domains) for split, domains in documents.items()})


def domain_names(folder: Path) -> list[str]:
    """Return the domains of a prepared folder, sorted; a ``UserError`` if it does not tell them."""
    return sorted({name for documents in _read(folder).values() for name in documents})


def divided_split(folder: Path, split: str) -> tuple[str, str | None]:
    """Return the split that has files, and the domain that ``split`` is of it: ``train_brown`` -> ``train``, ``brown``.

    Held-out parts have files of their own: ``test_brown`` -> ``test_brown``, None.
    """
    whole, _, name = split.partition("_")
    has_files = (folder / f"{split}.idx").is_file() or not (folder / FILE).is_file()
    return (split, None) if has_files or name not in domain_names(folder) else (whole, name)


def domains_of_lines(folder: Path, split: str, sizes: np.ndarray) -> np.ndarray:
    """Return the domain of each line of a split, ``(lines,)`` indices of ``domain_names``.

    An empty line, which ends a document, is of that document's domain.

    Args:
        sizes: tokens of each line, its end mark included; a line of one token is empty.

    Raises:
        UserError: nobody tells the domains, or it is those of other lines.
    """
    documents, names = _read(folder), domain_names(folder)
    if split not in documents:
        _, _, domain = split.partition("_")
        if domain not in names:
            raise UserError(f"{folder / FILE} tells nothing of split {split}, only of {', '.join(documents)}")
        return np.full(len(sizes), names.index(domain))
    ends = sizes == 1
    if ends.sum() + 1 != len(documents[split]):
        raise UserError(
            f"{folder / FILE} tells of {len(documents[split]):,} documents of {split}, which has {ends.sum() + 1:,}: "
            "it is not of this text"
        )
    numbers = np.array([names.index(name) for name in documents[split]])
    return numbers[np.cumsum(ends) - ends]


def domain_tokens(folder: Path, sizes: np.ndarray) -> dict[str, int]:
    """Return how many training tokens each domain has; ``sizes``: tokens of each line of the training text."""
    names = domain_names(folder)
    tokens = np.bincount(domains_of_lines(folder, "train", sizes), weights=sizes, minlength=len(names))
    return dict(zip(names, tokens.astype(int).tolist()))


def _read(folder: Path) -> dict[str, list[str]]:
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"{path}, which tells the domain of every document, is missing: prepare the data with mhmoe prepare "
            "english --source mix, or domains (--overwrite writes it beside the same text)"
        )
    return {split: domains.split() for split, domains in read_json(path).items()}

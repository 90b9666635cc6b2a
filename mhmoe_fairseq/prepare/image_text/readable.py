"""Pictures that cannot be read are left out before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from tqdm import tqdm

from ...common.errors import UserError
from ...data.images.reading import PictureError, read_picture
from .pictures import Picture


def drop_unreadable(folder: Path, pictures: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """Decodes every picture once; files that are no good are deleted.

    Args:
        folder: what the pictures' paths are relative to.

    Returns:
        the pictures that are left, and what was wrong with the others.

    Raises:
        UserError: none is left.
    """
    kept, problems = [], []
    for picture in tqdm(pictures, desc="read pictures", unit=" pictures", disable=None):
        try:
            read_picture(folder / picture.path)
        except PictureError as error:
            problems.append(str(error).replace(f"{folder}/", ""))
            (folder / picture.path).unlink(missing_ok=True)
        else:
            kept.append(picture)
    if not kept:
        reason = problems[0] if problems else "there are none"
        raise UserError(f"--source: none of {len(pictures)} pictures can be read ({reason})")
    return kept, problems

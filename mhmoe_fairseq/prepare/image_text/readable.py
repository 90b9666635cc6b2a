"""Images that cannot be read are left out before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from tqdm import tqdm

from ...common.errors import UserError
from ...data.images.reading import ImageError, read_image
from .images import SourceImage


def drop_unreadable(folder: Path, images: Sequence[SourceImage]) -> tuple[list[SourceImage], list[str]]:
    """Decodes every image once; files that are no good are deleted.

    Args:
        folder: what the images' paths are relative to.

    Returns:
        the images that are left, and what was wrong with the others.

    Raises:
        UserError: none is left.
    """
    kept, problems = [], []
    for image in tqdm(images, desc="read images", unit=" images", disable=None):
        try:
            read_image(folder / image.path)
        except ImageError as error:
            problems.append(str(error).replace(f"{folder}/", ""))
            (folder / image.path).unlink(missing_ok=True)
        else:
            kept.append(image)
    if not kept:
        reason = problems[0] if problems else "there are none"
        raise UserError(f"--source: none of {len(images)} images can be read ({reason})")
    return kept, problems

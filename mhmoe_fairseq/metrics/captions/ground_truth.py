"""Reference captions in COCO's own layout."""

from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import read_json


def read_ground_truth(path: Path) -> dict[int, list[str]]:
    """The captions of every image of a file such as ``coco_karpathy_val_gt.json``.

    The file is ``{"images": [{"id"}, ...], "annotations": [{"image_id", "id", "caption"}, ...]}``, other fields are
    ignored.

    Returns:
        references by image id, in the file's order.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: naming the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the captions that a model's are scored against")
    content = read_json(path)
    try:
        references: dict[int, list[str]] = {_image_id(image["id"]): [] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"], start=1):
            image = _image_id(annotation["image_id"])
            if image not in references:
                raise UserError(f"{path}: annotation {number} is of image {image}, which is not in its list of images")
            if not isinstance(annotation["caption"], str):
                raise UserError(f"{path}: annotation {number} has no text in caption")
            references[image].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of COCO captions: {error!r} is missing or malformed") from error
    bare = next((image for image, captions in references.items() if not captions), None)
    if bare is not None or not references:
        raise UserError(f"{path}: " + ("no image in it" if not references else f"image {bare} has no caption"))
    return references


def _image_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"image id {value!r}")
    return value

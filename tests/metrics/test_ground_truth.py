"""Reference captions in COCO's layout, and files that are not."""

import json

import pytest

from mhmoe_fairseq.metrics.captions import read_ground_truth

IMAGES = [{"id": 7, "file_name": "7.jpg"}, {"id": 3}]
ANNOTATIONS = [
    {"image_id": 3, "id": 1, "caption": "a cat"},
    {"image_id": 7, "id": 2, "caption": "a dog"},
    {"image_id": 3, "id": 3, "caption": "the cat"},
]


def write(path, images=IMAGES, annotations=ANNOTATIONS, **others):
    path.write_text(json.dumps({"images": images, "annotations": annotations, **others}))
    return path


def test_captions_by_image(tmp_path):
    found = read_ground_truth(write(tmp_path / "gt.json", info={}, licenses=[]))
    assert found == {7: ["a dog"], 3: ["a cat", "the cat"]}
    assert list(found) == [7, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": [*ANNOTATIONS, {"image_id": 9, "id": 4, "caption": "x"}]}, "annotation 4 is of image 9"),
        ({"annotations": ANNOTATIONS[:1]}, "image 7 has no caption"),
        ({"images": [], "annotations": []}, "no image in it"),
        ({"annotations": [{"image_id": 3, "id": 1, "caption": None}]}, "annotation 1 has no text"),
        ({"images": [{"id": "7"}]}, "not a file of COCO captions"),
        ({"images": [{}]}, "not a file of COCO captions: KeyError"),
        ({"images": 5}, "not a file of COCO captions"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_ground_truth(write(tmp_path / "gt.json", **changes))


def test_a_missing_file_and_one_that_is_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="gt.json is missing"):
        read_ground_truth(tmp_path / "gt.json")
    (tmp_path / "gt.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="gt.json:1: not valid JSON"):
        read_ground_truth(tmp_path / "gt.json")
    (tmp_path / "gt.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file of COCO captions"):
        read_ground_truth(tmp_path / "gt.json")

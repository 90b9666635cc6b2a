"""Index files as unilm's scripts write them, made by hand; what is broken names its file and line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mhmoe_fairseq.data.multimodal import index as beit3
from mhmoe_fairseq.data.multimodal.fields import MISSING
from mhmoe_fairseq.data.multimodal.index import TASKS, index_files, read_index, write_index, written_file

# Each file as BEiT-3's readers document it: names, fields and their order, one object per line.
FILES = {
    "image.train.jsonl": '{"image_path": "images/a.png"}\n{"image_path": "images/\u00e4 b.png"}\n',
    "pair.train.jsonl": (
        '{"image_path": "images/a.png", "text_segment": [7, 8], "image_id": 0, "language": "en"}\n'
        '{"image_path": "images/b.png", "text_segment": [], "image_id": 1}\n'
    ),
    "vqa.train.jsonl": (
        '{"image_path": "train2014/COCO_train2014_000000458752.jpg", "text_segment": [99, 17, 4], '
        '"labels": [3], "scores": [1.0], "qid": 458752000}\n'
        '{"image_path": "train2014/COCO_train2014_000000458752.jpg", "text_segment": [5], '
        '"labels": [0, 2, 1], "scores": [0.9, 0.3, 0.6], "qid": 458752001}\n'
    ),
    "vqa.trainable_val.jsonl": (
        '{"image_path": "val2014/COCO_val2014_000000262148.jpg", "text_segment": [6, 3], '
        '"labels": [1, 2], "scores": [0.3, 1], "qid": 262148000}\n'
    ),
    "vqa.rest_val.jsonl": (
        '{"image_path": "val2014/v.jpg", "text_segment": [6], "labels": [1], "scores": [0.6], "qid": 1}\n'
    ),
    "vqa.test.jsonl": (
        '{"image_path": "test2015/t.jpg", "text_segment": [6, 7], "labels": [], "scores": [], "qid": 2}\n'
        '{"image_path": "test2015/t.jpg", "text_segment": [6], "labels": [], "qid": 3}\n'
    ),
    "vqa.test-dev.jsonl": (
        '{"image_path": "test2015/t.jpg", "text_segment": [6], "labels": [], "scores": [], "qid": 4}\n'
    ),
    "nlvr2.train.index.jsonl": (
        '{"image_path": "images/train/4/train-10171-0-img0.png", "image2_path": '
        '"images/train/4/train-10171-0-img1.png", "text_segment": [11, 12], "label": 1, '
        '"identifier": "train-10171-0-0"}\n'
    ),
    "nlvr2.dev.index.jsonl": (
        '{"image_path": "dev/dev-1-0-img0.png", "image2_path": "dev/dev-1-0-img1.png", "text_segment": [11], '
        '"label": 0, "identifier": "dev-1-0-0"}\n'
    ),
    "nlvr2.test-P.index.jsonl": (
        '{"image_path": "test1/a-img0.png", "image2_path": "test1/a-img1.png", "text_segment": [11], '
        '"label": null, "identifier": "test1-0-0-0"}\n'
        '{"image_path": "test1/a-img0.png", "image2_path": "test1/a-img1.png", "text_segment": [11], '
        '"identifier": "test1-0-0-1"}\n'
    ),
    "coco_captioning.train.jsonl": (
        '{"image_path": "train2014/a.jpg", "text_segment": [20, 21, 22], "image_id": 57870}\n'
        '{"image_path": "train2014/a.jpg", "text_segment": [20, 23], "image_id": 57870}\n'
    ),
    "coco_captioning.val.jsonl": '{"image_path": "val2014/b.jpg", "text_segment": null, "image_id": 522418}\n',
    "coco_captioning.test.jsonl": '{"image_path": "val2014/c.jpg", "text_segment": null, "image_id": 391895}\n',
    "nocaps.val.jsonl": '{"image_path": "val/0013.jpg", "text_segment": null, "image_id": 0}\n',
    "coco_retrieval.train.jsonl": '{"image_path": "val2014/d.jpg", "text_segment": [30], "image_id": 0}\n',
    "flickr30k.test.jsonl": '{"image_path": "flickr30k-images/1.jpg", "text_segment": [31, 32], "image_id": 0}\n',
    "imagenet.train.index.jsonl": '{"image_path": "train/n01440764/n01440764_10026.JPEG", "label": 0}\n',
    "imagenet.val.index.jsonl": '{"image_path": "val/n15075141/ILSVRC2012_val_1.JPEG", "label": 999}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def rows_of(*names: str) -> list[dict]:
    """The slow way: every line as JSON."""
    return [json.loads(line) for name in names for line in FILES[name].splitlines()]


@pytest.mark.parametrize(
    "task, split, name, files",
    [
        ("image", "train", None, ["image.train.jsonl"]),
        ("pair", "train", None, ["pair.train.jsonl"]),
        ("vqa", "train", None, ["vqa.train.jsonl", "vqa.trainable_val.jsonl"]),
        ("vqa", "valid", None, ["vqa.rest_val.jsonl"]),
        ("vqa", "test", None, ["vqa.test.jsonl"]),
        ("vqa", "test-dev", None, ["vqa.test-dev.jsonl"]),
        ("nlvr2", "train", None, ["nlvr2.train.index.jsonl"]),
        ("nlvr2", "valid", None, ["nlvr2.dev.index.jsonl"]),
        ("nlvr2", "test", None, ["nlvr2.test-P.index.jsonl"]),
        ("captioning", "train", None, ["coco_captioning.train.jsonl"]),
        ("captioning", "train", "nocaps", ["coco_captioning.train.jsonl"]),
        ("captioning", "valid", None, ["coco_captioning.val.jsonl"]),
        ("captioning", "valid", "nocaps", ["nocaps.val.jsonl"]),
        ("captioning", "test", "coco_captioning", ["coco_captioning.test.jsonl"]),
        ("retrieval", "train", None, ["coco_retrieval.train.jsonl"]),
        ("retrieval", "test", None, ["flickr30k.test.jsonl"]),
        ("imagenet", "train", None, ["imagenet.train.index.jsonl"]),
        ("imagenet", "valid", None, ["imagenet.val.index.jsonl"]),
        ("imagenet", "test", None, ["imagenet.val.index.jsonl"]),
    ],
)
def test_every_format_is_read(folder, task, split, name, files):
    assert index_files(folder, task, split, name) == [folder / file for file in files]
    index = read_index(folder, task, split, name)
    expected = rows_of(*files)
    assert len(index) == len(expected)
    for row, record in enumerate(expected):
        read = index.record(row)
        assert {key: value for key, value in record.items() if value is not None or key == "text_segment"} == {
            key: pytest.approx(value) if key == "scores" and value else value
            for key, value in read.items()
            if key in record
        }
        assert set(read) - set(record) <= {"scores"}


def test_classes_of_test_images_are_read_where_they_are_there(folder):
    """The real ImageNet's val is test; prepared data have test images on which no checkpoint was selected."""
    own = folder / "imagenet.test.index.jsonl"
    assert written_file(folder, "imagenet", "test") == own
    write_index(own, "imagenet", [{"image_path": "images/c.png", "label": 1}])
    assert index_files(folder, "imagenet", "test") == [own]
    assert read_index(folder, "imagenet", "test").record(0) == {"image_path": "images/c.png", "label": 1}
    assert index_files(folder, "imagenet", "valid") == [folder / "imagenet.val.index.jsonl"]
    own.unlink()
    (folder / "imagenet.val.index.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"imagenet\.val\.index\.jsonl is missing"):
        read_index(folder, "imagenet", "test")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written_to_is_read_first(tmp_path, task):
    for split in ("train", "valid", "test"):
        file = written_file(tmp_path, task, split)
        file.touch()
        assert index_files(tmp_path, task, split) == [file]
    assert len(list(tmp_path.iterdir())) == 3


def test_places_name_file_and_line(folder):
    text = "\n" + FILES["vqa.trainable_val.jsonl"] + "  \n" + FILES["vqa.trainable_val.jsonl"]
    (folder / "vqa.trainable_val.jsonl").write_text(text)
    index = read_index(folder, "vqa", "train")
    assert [index.place(row) for row in range(len(index))] == [
        f"{folder}/vqa.train.jsonl:1",
        f"{folder}/vqa.train.jsonl:2",
        f"{folder}/vqa.trainable_val.jsonl:2",
        f"{folder}/vqa.trainable_val.jsonl:4",
    ]


def test_columns(folder):
    vqa = read_index(folder, "vqa", "train")
    assert [vqa["image_path"][row][-8:] for row in range(3)] == ["8752.jpg", "8752.jpg", "2148.jpg"]
    assert vqa["text_segment"].lengths.tolist() == [3, 1, 2] and vqa["text_segment"][0].tolist() == [99, 17, 4]
    assert vqa["labels"][1].tolist() == [0, 2, 1]
    assert vqa["scores"][1].tolist() == pytest.approx([0.9, 0.3, 0.6])
    assert vqa["qid"].tolist() == [458752000, 458752001, 262148000]
    captions = read_index(folder, "captioning", "valid")
    assert captions["text_segment"].null_rows.tolist() == [0]
    assert read_index(folder, "captioning", "train")["text_segment"].null_rows.tolist() == []
    assert not len(read_index(folder, "pair", "train")["text_segment"].null_rows)  # an empty text is not missing
    assert "label" not in read_index(folder, "nlvr2", "test") and "label" in read_index(folder, "nlvr2", "valid")
    assert "scores" in read_index(folder, "vqa", "test")


def test_labels_of_some_lines_only(folder):
    lines = rows_of("nlvr2.dev.index.jsonl", "nlvr2.test-P.index.jsonl")
    (folder / "nlvr2.dev.index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_index(folder, "nlvr2", "valid")["label"].tolist() == [0, MISSING, MISSING]


def test_a_second_file_may_be_absent_and_the_first_may_not(folder):
    (folder / "vqa.trainable_val.jsonl").unlink()
    assert len(read_index(folder, "vqa", "train")) == 2
    (folder / "vqa.train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"vqa\.train\.jsonl is missing"):
        read_index(folder, "vqa", "train")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written_is_read(folder, tmp_path, task):
    index = read_index(folder, task, "train")
    records = [index.record(row) for row in range(len(index))]
    target = tmp_path / "copy"
    target.mkdir()
    file = index_files(target, task, "train")[0]
    assert write_index(file, task, (record for record in records)) == len(records)
    again = read_index(target, task, "train")
    assert [again.record(row) for row in range(len(again))] == records
    assert [path.name for path in target.iterdir()] == [file.name]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "image.train.jsonl"
    write_index(file, "image", [{"image_path": "a.png"}])
    with pytest.raises(ValueError, match=r"image\.train\.jsonl:2: no field 'image_path'"):
        write_index(file, "image", [{"image_path": "b.png"}, {"path": "c.png"}])
    assert file.read_text() == '{"image_path": "a.png"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["image.train.jsonl"]


FIRST_FILES = {
    "image": "image.train.jsonl",
    "vqa": "vqa.train.jsonl",
    "nlvr2": "nlvr2.train.index.jsonl",
    "captioning": "coco_captioning.train.jsonl",
    "imagenet": "imagenet.train.index.jsonl",
}


def good(task: str, **changes) -> dict:
    return {**rows_of(FIRST_FILES[task])[0], **changes}


BROKEN = [
    ("vqa", good("vqa", labels=[1, 2]), "2 labels and 1 scores, must be as many"),
    ("vqa", good("vqa", scores=[1.5]), r"field 'scores' is \[1.5\]: must be a list of numbers from 0 to 1"),
    ("vqa", good("vqa", scores=[float("nan")]), "field 'scores' is .*NaN"),
    ("vqa", good("vqa", labels=[-1]), r"field 'labels' is \[-1\]: must be a list of ids"),
    ("vqa", good("vqa", labels=None), "field 'labels' is null: must be a list of ids"),
    ("vqa", good("vqa", qid="7"), "field 'qid' is \"7\": must be a whole number"),
    ("vqa", good("vqa", qid=True), "field 'qid' is true: must be a whole number"),
    ("vqa", good("vqa", qid=2**70), "field 'qid' is 118.*: must be a whole number"),
    ("vqa", good("vqa", text_segment=None), "field 'text_segment' is null: must be a list of ids"),
    ("captioning", good("captioning", text_segment=["\u2581a"]), "must be a list of token ids, not of pieces"),
    ("captioning", good("captioning", text_segment="a man"), "must be a list of ids"),
    ("captioning", good("captioning", text_segment=[0, 9, 2]), r"must have no <s>, <pad> or </s> \(0, 1, 2\)"),
    ("captioning", good("captioning", text_segment=[2**40]), "must be a list of ids"),
    ("captioning", good("captioning", text_segment=[5.0]), "must be a list of ids"),
    ("captioning", good("captioning", image_id=-4), "field 'image_id' is -4: must be a whole number, 0 or more"),
    ("nlvr2", good("nlvr2", label=2), "field 'label' is 2, must be 0 or 1"),
    ("nlvr2", good("nlvr2", label="True"), "field 'label' is \"True\": must be a whole number"),
    ("nlvr2", good("nlvr2", identifier=""), "field 'identifier' is \"\": must be a text that is not empty"),
    ("imagenet", good("imagenet", label=None), "field 'label' is null"),
    ("image", {"image_path": ""}, "field 'image_path' is \"\": must be a relative path"),
    ("image", {"image_path": 3}, "field 'image_path' is 3: must be a relative path"),
    ("image", {"image_path": "a\0b"}, "must be a relative path"),
    ("image", {"image_path": "\ud83d.png"}, "half a surrogate pair"),
    ("image", {"image_path": "/etc/passwd"}, "must stay within the data folder: no absolute path and no '..'"),
    ("image", {"image_path": "../x.png"}, "must stay within the data folder"),
    ("image", {"image_path": "images/../../x.png"}, "must stay within the data folder"),
    ("image", {"path": "x.png"}, "no field 'image_path'; it has path"),
    ("image", {}, "no field 'image_path'; it has none"),
]


@pytest.mark.parametrize("task, record, message", BROKEN)
def test_a_broken_line_names_file_line_and_field(folder, task, record, message):
    file = index_files(folder, task, "train")[0]
    lines = [json.dumps(good(task)) for _ in range(2)]
    file.write_text("\n".join([*lines, json.dumps(record), lines[0]]) + "\n")
    with pytest.raises(ValueError, match=rf"{file.name}:3: .*{message}"):
        read_index(folder, task, "train")


@pytest.mark.parametrize("line, message", [("{", "not valid JSON"), ("[1]", "needs a JSON object"), ("NaN", "object")])
def test_a_line_that_is_no_object(folder, line, message):
    (folder / "image.train.jsonl").write_text('{"image_path": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"image\.train\.jsonl:2: .*{message}"):
        read_index(folder, "image", "train")


def test_a_cut_off_last_line_bad_utf8_and_no_line(folder):
    file = folder / "image.train.jsonl"
    file.write_text(FILES["image.train.jsonl"][:-10])
    with pytest.raises(ValueError, match=r"image\.train\.jsonl:2: not valid JSON"):
        read_index(folder, "image", "train")
    file.write_bytes(b'{"image_path": "\xff"}\n')
    with pytest.raises(ValueError, match=r"image\.train\.jsonl: invalid UTF-8 at byte 16"):
        read_index(folder, "image", "train")
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"image\.train\.jsonl: has no lines, so split train of image is empty"):
        read_index(folder, "image", "train")


def test_tokens_of_another_dictionary(folder):
    assert len(read_index(folder, "vqa", "train", vocabulary_size=100)) == 3
    with pytest.raises(ValueError, match=r"vqa\.train\.jsonl:1: token id 99, dict\.txt has 99 words"):
        read_index(folder, "vqa", "train", vocabulary_size=99)


def test_unknown_task_split_and_name(folder):
    with pytest.raises(ValueError, match="task 'vga' has no index files; there are image, pair, vqa"):
        read_index(folder, "vga", "train")
    with pytest.raises(ValueError, match="nlvr2 has no split 'dev'; there are train, valid, test"):
        read_index(folder, "nlvr2", "dev")
    with pytest.raises(ValueError, match="retrieval has no data set 'coco'; there are coco_retrieval, flickr30k"):
        read_index(folder, "retrieval", "train", "coco")
    with pytest.raises(ValueError, match="vqa has no data set 'coco'"):
        read_index(folder, "vqa", "train", "coco")


def test_large_indexes_take_little_memory(tmp_path):
    """About the bytes of the values: 25 of the path, 4 for each of 10 tokens, and the numbers."""
    file = tmp_path / "coco_captioning.train.jsonl"
    records = [
        {"image_path": f"train2014/{number:012}.jpg", "text_segment": list(range(5, 15)), "image_id": number}
        for number in range(2000)
    ]
    write_index(file, "captioning", records)
    index = read_index(tmp_path, "captioning", "train")
    assert index["image_path"][1999] == "train2014/000000001999.jpg" and index["image_id"][1999] == 1999
    assert index["text_segment"].values.dtype == np.int32
    assert len(pickle.dumps(index)) < 2000 * (26 + 8 + 40 + 8 + 8 + 4) + 2000


def test_answers(tmp_path):
    file = tmp_path / "answer2label.txt"
    file.write_text('{"answer": "yes", "label": 0}\n{"answer": "no", "label": 1}\n{"answer": "2", "label": 2}\n\n')
    assert beit3.read_answers(tmp_path) == ["yes", "no", "2"]
    beit3.write_answers(tmp_path, ["caf\u00e9", "no"])
    assert file.read_text(encoding="utf-8") == '{"answer": "caf\u00e9", "label": 0}\n{"answer": "no", "label": 1}\n'
    assert beit3.read_answers(tmp_path) == ["caf\u00e9", "no"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"answer": "a", "label": 0}\n{"answer": "b", "label": 2}', ":2: label 2, must be its place .*: 1"),
        ('{"answer": "a", "label": 0}\n{"answer": "a", "label": 1}', ":2: answer 'a' is on line 1 too"),
        ('\n{"answer": "a", "label": 0}\n\n{"answer": "a", "label": 1}', ":4: answer 'a' is on line 2 too"),
        ('{"answer": "a", "label": 0}\n{"answer"', ":2: not valid JSON"),
        ('{"answer": 3, "label": 0}', ":1: must be"),
        ('["a", 0]', ":1: must be"),
        ('{"answer": "a", "label": false}', ":1: must be"),
        ('{"answer": "a", "label": 0}', ": 1 answers, must be at least two"),
        ("", ": 0 answers"),
    ],
)
def test_broken_answers(tmp_path, lines, message):
    (tmp_path / "answer2label.txt").write_text(lines)
    with pytest.raises(ValueError, match=r"answer2label\.txt" + message):
        beit3.read_answers(tmp_path)


def test_no_answers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"answer2label\.txt is missing"):
        beit3.read_answers(tmp_path)

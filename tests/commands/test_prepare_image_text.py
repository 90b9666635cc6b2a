"""``mhmoe prepare image-text``: what the prepared folder holds, and that it can be made again, resumed and refused."""

import json
from dataclasses import dataclass, replace

import pytest
from fairseq.data import Dictionary, data_utils
from image_text_data import CODES, COLOURS, Shapes, prepare_shapes, shape_settings, shapes_preparation
from preparing import hashes

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json, sha256_of
from mhmoe_fairseq.data.multimodal.index import index_files, read_answers, read_index
from mhmoe_fairseq.data.visual_tokenizers import load_visual_tokenizer
from mhmoe_fairseq.prepare import base
from mhmoe_fairseq.prepare.image_text.images import caption_sentences
from mhmoe_fairseq.prepare.image_text.pipeline import ImageTextPreparation

SPLITS = ("train", "valid", "test")
TASKS = ("image", "pair", "vqa", "nlvr2", "captioning", "retrieval", "imagenet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_shapes(tmp_path_factory.mktemp("prepared") / "data")


def records(folder, task, split):
    index = read_index(folder, task, split)
    return [index.record(row) for row in range(len(index))]


def text_of(folder, ids):
    symbols = Dictionary.load(str(folder / "dict.txt")).symbols
    return "".join(symbols[index] for index in ids).replace("\u2581", " ").strip()


def paths(row):
    return {row[name] for name in ("image_path", "image2_path") if name in row}


def test_every_index_can_be_read_and_no_image_is_in_two_parts(folder):
    size = len(Dictionary.load(str(folder / "dict.txt")))
    of_part = {
        split: set().union(*(paths(row) for task in TASKS for row in records(folder, task, split))) for split in SPLITS
    }
    assert sorted(map(len, of_part.values())) == [6, 6, 12]
    assert len(set().union(*of_part.values())) == 24
    assert all((folder / path).is_file() for part in of_part.values() for path in part)
    for task in TASKS:
        for split in SPLITS:
            read_index(folder, task, split, vocabulary_size=size)


@dataclass(frozen=True)
class Twins(Shapes):
    """In every colour the small square looks like the large circle, and is one thing with the large bar."""

    def open(self, languages, folder, cache_dir, say):
        opened = super().open(languages, folder, cache_dir, say)
        units = {f"small-{colour}-square": f"large-{colour}-bar" for colour in COLOURS}
        for colour in COLOURS:
            content = (folder / f"images/large-{colour}-circle.png").read_bytes()
            (folder / f"images/small-{colour}-square.png").write_bytes(content)
        images = [replace(image, unit=units.get(image.unit, image.unit)) for image in opened.images]
        return opened._replace(images=images, sentences=[*opened.sentences, *caption_sentences(images)])


@pytest.mark.parametrize("seed", [1, 2])
def test_no_content_is_in_two_parts(tmp_path, seed):
    folder = prepare_shapes(tmp_path / "data", Twins(), seed=seed, vocab_size=282, tokenizer=None, derived=None)
    shown = {split: {row["image_path"] for row in records(folder, "image", split)} for split in SPLITS}
    contents = [sha256_of(folder / path) for split in SPLITS for path in shown[split]]
    assert len(contents) == 24 and len(set(contents)) == 20
    assert sum(len({sha256_of(folder / path) for path in shown[split]}) for split in SPLITS) == 20
    for colour in COLOURS:
        alike = {f"images/{name}.png" for name in (f"large-{colour}-circle", f"large-{colour}-bar")}
        assert any(alike <= paths for paths in shown.values())
    for split in SPLITS:
        texts = (folder / "text" / f"{split}.txt").read_text().splitlines()
        captions = {text for text in texts if "," not in text}
        assert {f"images/{caption.replace(' ', '-')}.png" for caption in captions} == shown[split]
    manifest = read_json(folder / "manifest.json")
    assert manifest["source"]["joined_things"] == 4
    assert sum(part["units"] for part in manifest["parts"].values()) == 16


def test_the_dictionary_ends_with_the_mask(folder):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    assert dictionary.symbols[:4] == ["<s>", "<pad>", "</s>", "<unk>"] and dictionary.symbols[-1] == "<mask>"
    assert len(dictionary) == 301 and not any(symbol.startswith("madeupword") for symbol in dictionary.symbols)


def test_captions_questions_and_texts_are_what_the_source_says(folder):
    for row in records(folder, "pair", "train"):
        name = row["image_path"].removeprefix("images/").removesuffix(".png")
        assert text_of(folder, row["text_segment"]) == name.replace("-", " ")
        assert row["language"] == "en"
    answers = read_answers(folder)
    for row in records(folder, "vqa", "test"):
        size, colour, shape = row["image_path"].removeprefix("images/").removesuffix(".png").split("-")
        if text_of(folder, row["text_segment"]) == "what colour is it?":
            assert [answers[label] for label in row["labels"]] == [colour]
        assert row["scores"] == [1.0]
    lines = data_utils.load_indexed_dataset(str(folder / "text" / "valid"))
    texts = (folder / "text" / "valid.txt").read_text().splitlines()
    assert [text_of(folder, line[:-1].tolist()) for line in lines] == texts and lines[0][-1] == 2


def test_captioning_has_coco_files(folder):
    truth = read_json(folder / "coco_karpathy_test_gt.json")
    rows = records(folder, "captioning", "test")
    assert all(row["text_segment"] is None for row in rows)
    names = {row["image_id"]: row["image_path"] for row in rows}
    assert sorted(names) == sorted(image["id"] for image in truth["images"])
    for annotation in truth["annotations"]:
        assert names[annotation["image_id"]] == f"images/{annotation['caption'].replace(' ', '-')}.png"
    trained = {row["image_id"] for row in records(folder, "captioning", "train")}
    assert len(trained) == 12 and trained.isdisjoint(names)
    assert {row["image_id"] for row in records(folder, "pair", "test")} >= set(names)


def test_retrieval_counts_the_images_of_a_part(folder):
    for split, count in (("train", 12), ("valid", 6), ("test", 6)):
        assert [row["image_id"] for row in records(folder, "retrieval", split)] == list(range(count))


def test_classes_are_the_kinds(folder):
    classes = read_json(folder / "imagenet.classes.json")
    assert classes == ["bar", "circle", "square"]
    counts = read_json(folder / "manifest.json")["indexes"]
    for split, part, images in (("train", "train", 12), ("valid", "val", 6), ("test", "test", 6)):
        rows = records(folder, "imagenet", split)
        assert all(f"-{classes[row['label']]}.png" in row["image_path"] for row in rows)
        assert {row["image_path"] for row in rows} == {row["image_path"] for row in records(folder, "image", split)}
        assert len(rows) == counts[f"imagenet.{part}.index.jsonl"] == images


def test_the_manifest_says_what_is_derived(folder):
    manifest = read_json(folder / "manifest.json")
    assert manifest["kind"] == "image-text" and manifest["source"]["name"] == "shapes"
    assert "neither VQAv2 nor NLVR2" in manifest["derived"]["note"]
    baseline = manifest["derived"]["questions"]["test"]["question_only_accuracy"]
    assert 20 < baseline["by_question"] < 60
    assert manifest["derived"]["statements"]["train"]["text_only_accuracy"] == 50.0
    for name, lines in manifest["indexes"].items():
        if name.endswith(".jsonl"):
            assert len((folder / name).read_text().splitlines()) == lines
    tokenizer = load_visual_tokenizer(folder / "visual_tokenizer.pt")
    assert tokenizer.vocab_size == CODES and tokenizer.token_shape == (4, 4)
    assert manifest["visual_tokenizer"]["train"] == tokenizer.provenance["train"]


def test_only_training_images_make_the_codes(folder, tmp_path):
    """The codes are the same when every held-out image is another one."""
    from mhmoe_fairseq.prepare.visual_tokenizers.fitting import fit_tokenizer

    settings = shape_settings().tokenizer
    before = fit_tokenizer(folder, settings, say=print)
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "image.train.jsonl").write_bytes((folder / "image.train.jsonl").read_bytes())
    for row in records(folder, "image", "train"):
        (changed / row["image_path"]).parent.mkdir(exist_ok=True)
        (changed / row["image_path"]).write_bytes((folder / row["image_path"]).read_bytes())
    after = fit_tokenizer(changed, settings, say=print)
    assert before.centroids.equal(after.centroids)


def test_equal_settings_give_equal_files(folder, tmp_path):
    again = prepare_shapes(tmp_path / "again")
    first, second = hashes(folder), hashes(again)
    assert first == second and "visual_tokenizer.pt" in first
    other = hashes(prepare_shapes(tmp_path / "other", seed=2))
    assert other["image.test.jsonl"] != first["image.test.jsonl"]


def test_other_settings_are_refused_and_equal_ones_do_nothing(folder):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="another --seed"):
        shapes_preparation(Shapes(), seed=7).run(folder)
    said = []
    shapes_preparation(Shapes(), said.append).run(folder)
    assert "nothing to do" in said[-1]
    assert (folder / "manifest.json").read_bytes() == before


def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    dest = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(ImageTextPreparation, "_fit_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_shapes(dest)
    assert not (dest / "manifest.json").exists() and not (dest / "dict.txt").exists()
    with monkeypatch.context() as patched:
        patched.setattr(base, "train_sentencepiece", None)  # would be an error if it were called again
        prepare_shapes(dest)
    assert hashes(dest)["vqa.train.jsonl"] == hashes(prepare_shapes(tmp_path / "whole"))["vqa.train.jsonl"]


def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    folder = prepare_shapes(tmp_path / "data", Shapes(("large-red-bar", "small-blue-circle")))
    source = read_json(folder / "manifest.json")["source"]
    assert source["images"] == 22 and len(source["unreadable"]) == 2
    assert source["unreadable"][0].startswith("images/")
    named = (folder / "pair.train.jsonl").read_text() + (folder / "pair.test.jsonl").read_text()
    assert "large-red-bar" not in named and not (folder / "images" / "large-red-bar.png").exists()


def test_several_languages_and_text_of_ones_own(tmp_path):
    text = tmp_path / "own"
    text.mkdir()
    for split in SPLITS:
        (text / f"{split}.txt").write_text("".join(f"Plain  line {number} for {split}.\n\n" for number in range(20)))
    folder = prepare_shapes(tmp_path / "data", languages=("de", "en"), text_data=text, tokenizer=None, derived=None)
    rows = records(folder, "pair", "valid")
    assert len(rows) == 12 and {row["language"] for row in rows} == {"de", "en"}
    assert "Balken" in text_of(folder, [index for row in rows for index in row["text_segment"]])
    assert (folder / "text" / "test.txt").read_text().splitlines()[3] == "Plain line 3 for test."
    assert not (folder / "visual_tokenizer.pt").exists() and not (folder / "vqa.train.jsonl").exists()
    captions = [annotation["caption"] for annotation in read_json(folder / "coco_karpathy_val_gt.json")["annotations"]]
    assert captions and all(caption.split()[0] in ("kleiner", "grosser") for caption in captions)
    (text / "train.txt").write_bytes(b"not \xff UTF-8\n")
    with pytest.raises(UserError, match="train.txt: invalid UTF-8 at byte 4"):
        prepare_shapes(tmp_path / "broken", text_data=text)
    with pytest.raises(UserError, match="--text-data"):
        (text / "valid.txt").write_text("Changed.\n")
        prepare_shapes(folder, languages=("de", "en"), text_data=text, tokenizer=None, derived=None)


def test_a_source_without_text_for_a_part_says_so(tmp_path):
    class Silent(Shapes):
        def open(self, *arguments):
            return super().open(*arguments)._replace(sentences=[])

    with pytest.raises(UserError, match="no sentence for train; give --text-data DIR"):
        prepare_shapes(tmp_path / "data", Silent())


def test_a_folder_of_ones_own_from_the_command_line(capsys, tmp_path, folder):
    images = tmp_path / "images"
    for name in ("bar", "circle", "square"):
        (images / name).mkdir(parents=True)
    rows = []
    for image in sorted((folder / "images").iterdir()):
        size, colour, shape = image.stem.split("-")
        (images / shape / image.name).write_bytes(image.read_bytes())
        rows.append({"image": f"{shape}/{image.name}", "caption": [f"a {size} {colour} {shape}", f"one {shape}"]})
    (images / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["prepare", "image-text", "--source", "folder", str(images), "--dest", str(tmp_path / "data")]
    small = ["--vocab-size", "290", "--visual-vocab-size", "8", "--image-size", "32", "--valid-fraction", "0.25"]
    status = main([*command, *small])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "") and "24 with a caption" in captured.out
    rows = records(tmp_path / "data", "captioning", "train")
    assert len(rows) == 2 * len({row["image_path"] for row in rows})
    assert index_files(tmp_path / "data", "imagenet", "train")[0].is_file()
    assert "kind" in read_json(tmp_path / "data" / "manifest.json")

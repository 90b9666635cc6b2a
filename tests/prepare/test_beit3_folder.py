"""Folders as unilm's scripts leave them: hand-made index files in the documented formats, checked and completed."""

import json
import shutil

import pytest
import sentencepiece
from fairseq.data import Dictionary, data_utils
from image_text_data import Shapes, draw_shape, prepare_shapes

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json
from mhmoe_fairseq.data.multimodal.index import read_index
from mhmoe_fairseq.data.visual_tokenizers import load_visual_tokenizer
from mhmoe_fairseq.prepare.image_text.beit3_folder import Completion, PieceVocabulary
from mhmoe_fairseq.prepare.visual_tokenizers.settings import KMeansSettings

TOKENIZER = KMeansSettings(vocab_size=8, patch_size=8, image_size=32, max_patches=500, iterations=3)
CAPTIONS = ["a red bar", "a blue circle", "two circles", "one bar beside a circle"]


def train_upstream_model(path):
    """A model with SentencePiece's own order of special pieces, as ``beit3.spm`` has: <unk>, <s>, </s>."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 3), model_prefix=str(path.with_suffix("")), vocab_size=24,
        model_type="unigram", minloglevel=3, hard_vocab_limit=False,
    )  # fmt: skip
    path.with_suffix(".model").rename(path)
    path.with_suffix(".vocab").unlink()


def xlm_roberta_ids(model, text):
    """The documented mapping: a piece's id and one more."""
    return [index + 1 for index in model.encode(text)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def upstream(tmp_path):
    """COCO captioning and retrieval, VQAv2 with several answers, NLVR2 without test labels."""
    folder = tmp_path / "beit3"
    (folder / "val2014").mkdir(parents=True)
    train_upstream_model(folder / "beit3.spm")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "beit3.spm"))
    texts = [xlm_roberta_ids(model, caption) for caption in CAPTIONS]
    for number in range(8):
        draw_shape(5 + number, (20 * number, 90, 200), ("bar", "circle")[number % 2]).convert("RGB").save(
            folder / "val2014" / f"{number}.jpg"
        )
    images = [f"val2014/{number}.jpg" for number in range(8)]
    pairs = [{"image_path": images[n % 4], "text_segment": texts[n % 4], "image_id": 900 + n % 4} for n in range(8)]
    write_lines(folder / "coco_captioning.train.jsonl", pairs)
    null = [{"image_path": path, "text_segment": None, "image_id": n} for n, path in enumerate(images[4:])]
    write_lines(folder / "coco_captioning.val.jsonl", null[:2])
    write_lines(folder / "coco_captioning.test.jsonl", null[2:])
    held_out = [{"image_path": images[4 + n], "text_segment": texts[n], "image_id": n} for n in range(4)]
    write_lines(folder / "coco_retrieval.train.jsonl", pairs)
    write_lines(folder / "coco_retrieval.val.jsonl", held_out[:2])
    write_lines(folder / "coco_retrieval.test.jsonl", held_out[2:])
    asked = {"text_segment": texts[0], "image_path": images[0]}
    write_lines(folder / "vqa.train.jsonl", [{**asked, "labels": [0, 2], "scores": [0.3, 1.0], "qid": 1}])
    write_lines(folder / "vqa.trainable_val.jsonl", [{**asked, "labels": [1], "scores": [0.6], "qid": 2}])
    write_lines(folder / "vqa.rest_val.jsonl", [{**asked, "labels": [1], "scores": [1.0], "qid": 3}])
    write_lines(folder / "vqa.test.jsonl", [{**asked, "labels": [], "qid": 4}])
    write_lines(folder / "answer2label.txt", [{"answer": a, "label": n} for n, a in enumerate(("yes", "no", "red"))])
    two = {"image_path": images[0], "image2_path": images[1], "text_segment": texts[1], "identifier": "dev-1-0-0"}
    write_lines(folder / "nlvr2.dev.index.jsonl", [{**two, "label": 1}])
    return folder


def complete(folder, **settings):
    said = []
    manifest = Completion(folder, said.append, **{"tokenizer": TOKENIZER, **settings}).run(folder)
    return manifest, said


def test_ids_are_those_of_the_upstream_tokenizer(upstream):
    model = sentencepiece.SentencePieceProcessor(model_file=str(upstream / "beit3.spm"))
    vocabulary = PieceVocabulary(upstream / "beit3.spm")
    lines = [*CAPTIONS, "circles and bars"]
    expected = [[3 if index == 1 else index for index in xlm_roberta_ids(model, line)] for line in lines]
    assert [vocabulary.encode(line) for line in lines] == expected
    complete(upstream)
    dictionary = Dictionary.load(str(upstream / "dict.txt"))
    assert dictionary.index("<mask>") == model.vocab_size() + 1 == len(dictionary) - 1
    assert all(dictionary[index + 1] == model.id_to_piece(index) for index in range(3, model.vocab_size()))


def test_a_folder_is_completed_for_pretraining(upstream):
    before = {path.name: path.read_bytes() for path in upstream.iterdir() if path.is_file()}
    manifest, said = complete(upstream)
    assert manifest["kind"] == "image-text" and manifest["indexes"]["vqa.train.jsonl"] == 2
    assert set(manifest["made"]) == {
        "dict.txt", "sentencepiece.model", "visual_tokenizer.pt",
        *(f"{task}.{split}.jsonl" for task in ("image", "pair") for split in ("train", "valid", "test")),
        *(f"text/{split}.{kind}" for split in ("train", "valid", "test") for kind in ("bin", "idx")),
    }  # fmt: skip
    assert len(read_index(upstream, "pair", "train")) == 8 and len(read_index(upstream, "pair", "valid")) == 2
    images = read_index(upstream, "image", "train")["image_path"]
    assert [images[row] for row in range(len(images))] == [f"val2014/{number}.jpg" for number in range(4)]
    lines = data_utils.load_indexed_dataset(str(upstream / "text" / "train"))
    assert len(lines) == 4 and lines[0].tolist()[-1] == 2
    assert load_visual_tokenizer(upstream / "visual_tokenizer.pt").vocab_size == 8
    assert all((upstream / name).read_bytes() == content for name, content in before.items())
    assert any("coco_captioning.val.jsonl: 2 lines" in line for line in said)


def test_a_second_run_makes_nothing_and_changes_nothing(upstream):
    first, _ = complete(upstream)
    before = {
        path: path.read_bytes() for path in upstream.rglob("*") if path.is_file() and path.name != "manifest.json"
    }
    second, said = complete(upstream)
    assert second["made"] == first["made"] and second["visual_tokenizer"] == first["visual_tokenizer"]
    assert not any(line.startswith("made:") for line in said)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_that_was_cut_off_is_the_same_data_in_the_end(upstream, tmp_path, monkeypatch):
    copy = shutil.copytree(upstream, tmp_path / "copy")
    whole, _ = complete(upstream)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Completion, "_write_manifest", lambda *_: (_ for _ in ()).throw(MemoryError("killed")))
        complete(copy)
    assert not (copy / "manifest.json").exists() and complete(copy)[0]["files"] == whole["files"]


def test_text_of_ones_own_is_encoded(upstream, tmp_path):
    (tmp_path / "own").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "own" / f"{split}.txt").write_text("a bar\n\n a  circle\n")
    complete(upstream, text_data=tmp_path / "own", tokenizer=None)
    lines = data_utils.load_indexed_dataset(str(upstream / "text" / "test"))
    vocabulary = PieceVocabulary(upstream / "beit3.spm")
    assert [line.tolist() for line in lines] == [[*vocabulary.encode(text), 2] for text in ("a bar", "a circle")]
    assert not (upstream / "visual_tokenizer.pt").exists()


_ASKED = {"image_path": "val2014/0.jpg", "text_segment": [9], "labels": [], "qid": 1}
_TWO_ANSWERS = [{"answer": "yes", "label": 0}, {"answer": "no", "label": 1}]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("nlvr2.dev.index.jsonl", [{"image_path": "val2014/0.jpg"}], "dev.index.jsonl:1: no field 'image2_path'"),
        ("coco_retrieval.val.jsonl", [{}], "coco_retrieval.val.jsonl:1: no field"),
        ("answer2label.txt", _TWO_ANSWERS, "vqa.train.jsonl:1: label 2, answer2label.txt has 2 answers"),
        ("vqa.test.jsonl", [_ASKED, {**_ASKED, "text_segment": [99]}], "vqa.test.jsonl:2: token id 99"),
        ("vqa.test.jsonl", [_ASKED, {**_ASKED, "image_path": "no.jpg"}], "vqa.test.jsonl:2: no image"),
    ],
)
def test_what_is_wrong_is_named(upstream, name, rows, message):
    write_lines(upstream / name, rows)
    with pytest.raises(UserError, match=message):
        complete(upstream)
    assert not (upstream / "manifest.json").exists()


def test_folders_that_are_none(upstream, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        complete(tmp_path / "nothing")
    (upstream / "beit3.spm").unlink()
    with pytest.raises(UserError, match="has neither dict.txt nor beit3.spm nor sentencepiece.model"):
        complete(upstream)
    Dictionary().save(str(upstream / "dict.txt"))
    with pytest.raises(UserError, match="dict.txt: has no <mask>"):
        complete(upstream)
    (tmp_path / "empty").mkdir()
    train_upstream_model(tmp_path / "empty" / "beit3.spm")
    with pytest.raises(UserError, match="has none of BEiT-3's index files"):
        complete(tmp_path / "empty")
    own = prepare_shapes(tmp_path / "own", Shapes())
    with pytest.raises(UserError, match="was made from shapes, there is nothing to complete"):
        complete(own)


def test_from_the_command_line(capsys, upstream, tmp_path):
    command = ["prepare", "image-text", "--source", "beit3-index", str(upstream), "--no-visual-tokenizer", "--dest"]
    status = main([*command, str(tmp_path / "elsewhere")])
    assert status == 2 and f"must be {upstream} itself" in capsys.readouterr().err
    status = main([*command, str(upstream)])
    out = capsys.readouterr().out
    assert status == 0 and "made: dict.txt" in out and "14 files made here" in out
    assert read_json(upstream / "manifest.json")["source"]["name"] == "beit3-index"

"""What the identity of data depends on: the dictionary and every split, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from mhmoe_fairseq.common.files import sha256_of
from mhmoe_fairseq.data.identity import DataIdentity, identify_data, identify_manifest

SPLITS = ("train.bin", "valid.bin", "test.bin")
# What each kind of folder is known by, and what lies beside it.
FOLDERS = {
    "one text": (("dict.txt", *SPLITS), ("train.idx", "sentencepiece.model", "text/train.txt")),
    "languages": (
        ("dict.txt", *(f"{language}/{name}" for language in ("de", "en") for name in SPLITS)),
        ("de/train.idx", "aligned/test.jsonl"),
    ),
    "images and text": (
        ("dict.txt", *(f"{kind}.{split}.jsonl" for kind in ("image", "pair") for split in ("train", "valid", "test")),
         *(f"text/{name}" for name in SPLITS)),
        ("images/1.png", "visual_tokenizer.pt", "vqa.train.jsonl"),
    ),
}  # fmt: skip


def write(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_digest_changes_with_every_file_that_is_read_and_no_other(kind: str, tmp_path: Path) -> None:
    read, beside = FOLDERS[kind]
    folder = write(tmp_path / "data", (*read, *beside))
    found = identify_data(folder)
    assert found.digest == identify_data(shutil.copytree(folder, tmp_path / "copy")).digest
    listed = {name: {"sha256": sha256_of(folder / name)} for name in read}
    manifest = {"source": {"name": "a corpus"}, "files": listed, "languages": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert identify_manifest(tmp_path / "manifest.json").digest == found.digest
    assert found.languages == (("de", "en") if kind == "languages" else ())
    assert found.has_images == (kind == "images and text")
    digests = {found.digest}
    for name in (*read, *beside):
        (folder / name).write_text("other")
        digests.add(identify_data(folder).digest)
        (folder / name).write_text(name)
        assert len(digests) == 1 + min(len(read), (*read, *beside).index(name) + 1), name
        (folder / name).unlink()
        is_read = name in read
        if name != "dict.txt":
            assert (identify_data(folder).digest != found.digest) == is_read, name
        (folder / name).write_text(name)


def test_two_files_that_change_places_are_other_data(tmp_path: Path) -> None:
    folder = write(tmp_path, ("dict.txt", *SPLITS))
    before = identify_data(folder).digest
    (folder / "valid.bin").write_text("test.bin")
    (folder / "test.bin").write_text("valid.bin")
    assert identify_data(folder).digest != before


def test_bytes_need_every_token() -> None:
    identity = DataIdentity("0", "a corpus", {"test": {"bytes": 200, "tokens": 50}})
    assert identity.bytes_of("test", 50) == 200
    assert identity.bytes_of("test", 49) is identity.bytes_of("valid", 50) is None

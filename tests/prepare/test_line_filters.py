"""Scripts of lines, and which lines of a translated corpus are left out."""

import pytest

from mhmoe_fairseq.data.documents import SeenTexts
from mhmoe_fairseq.data.languages import get_language
from mhmoe_fairseq.prepare.multilingual.cleaning import (  # fmt: skip
    KEPT,
    fits,
    foreign_letters,
    judge,
    letters_by_script,
    reads_like_english,
    script_of,
    spot_check,
)


def test_scripts_of_characters():
    scripts = [script_of(character) for character in "ßёωقहไ語"]
    assert scripts == ["LATIN", "CYRILLIC", "GREEK", "ARABIC", "DEVANAGARI", "THAI", "CJK"]
    assert script_of("Ａ") == "LATIN"
    assert [script_of(character) for character in "1 …ª$µ"] == [""] * 6
    assert letters_by_script("a Ж1 жб") == {"LATIN": 1, "CYRILLIC": 3}


@pytest.mark.parametrize(
    "code, line, expected",
    [
        ("ru", "Откройте файл config.txt в LibreOffice Writer", True),
        ("ru", "Use cfdisk with care, или так", False),
        ("bg", "ελληνικά και български", False),
        ("zh", "使用 LibreOffice Writer 打开文件", True),
        ("zh", "LibreOffice Writer 文件 and something else", False),
        ("zh", "ファイルを開く", False),
        ("th", "เปิดไฟล์ใน Writer", True),
        ("ur", "فائل کھولیں", True),
        ("ur", "फ़ाइल खोलें", False),
        ("de", "Größe 5 μm", True),
        ("de", "Sprachen: Русский, Deutsch", False),
        ("de", "12345 67", False),
        ("vi", "Mở tập tin", True),
    ],
)
def test_a_line_fits_its_language_with_names_and_code(code, line, expected):
    assert fits(letters_by_script(line), get_language(code)) is expected


def test_latin_is_never_foreign():
    assert foreign_letters(letters_by_script("открыть open ανοιχτό"), get_language("ru")) == 7
    assert foreign_letters(letters_by_script("open"), get_language("th")) == 0


ENGLISH = SeenTexts()
for seen in ("LibreOffice Writer Guide", "This is the file that you open."):
    ENGLISH.add(seen)


@pytest.mark.parametrize(
    "code, line, verdict",
    [
        ("de", "Die Datei wird geöffnet.", KEPT),
        ("de", "LibreOffice Writer Guide", "english_lines"),
        ("de", "That is the file which you open.", "english_lines"),
        ("de", "OK", "short_lines"),
        ("de", "a b c d e f g aa bb cc dd", "list_lines"),
        ("de", "Запустите программу", "other_script_lines"),
        ("en", "This is the file that you open.", KEPT),
        ("zh", "打开文件", KEPT),  # an ideograph counts for more than a letter
        ("zh", "打开", "short_lines"),
    ],
)
def test_verdicts(code, line, verdict):
    assert judge(line, get_language(code), ENGLISH) == verdict


@pytest.mark.parametrize(
    "line, expected",
    [
        ("The image can be found with Katze", True),
        ("Some modern cluster file systems provide perfect coherence, see Abschnitt 5", False),
        ("Wait for the signal", True),
        ("Das Feld for und das Feld while", False),
    ],
)
def test_english_is_told_by_its_small_words(line, expected):
    assert reads_like_english(line) is expected


@pytest.mark.parametrize(
    "line",
    [
        "Was ist eine Arbeitsfläche, und was habe ich davon?",
        "Der Befehl 'the' ist nicht definiert und wird in dieser Version nicht verwendet.",
        "Bu dosya silindi ve geri getirilemez",
        "Tập tin có thể mở được",
        "El archivo se abre con el editor",
    ],
)
def test_other_languages_do_not_read_like_english(line):
    assert not reads_like_english(line)


def test_spot_check_finds_what_does_not_belong(tmp_path):
    text = tmp_path / "de.txt"
    good = [f"Die Datei Nummer {number} wird geöffnet." for number in range(60)]
    text.write_text("\n".join([*good, "", "Файл открыт", "Das Zeichen Ω steht für Ohm."]) + "\n", encoding="utf-8")
    figures = spot_check(text, get_language("de"), seed=1)
    assert (figures["lines"], figures["foreign_script_lines"], figures["misfit_lines"]) == (62, 2, 1)
    assert set(figures["examples"]) == {"Файл открыт", "Das Zeichen Ω steht für Ohm."}
    assert figures["scripts"]["LATIN"] > 0.98 and set(figures["scripts"]) == {"LATIN", "CYRILLIC", "GREEK"}
    few = spot_check(text, get_language("de"), seed=1, num_lines=10)
    assert few["lines"] == 10 and few == spot_check(text, get_language("de"), seed=1, num_lines=10)

"""Scripts of lines, and which lines of a translated corpus are left out."""

from collections import Counter

import pytest

from mhmoe_fairseq.data.documents import SeenTexts
from mhmoe_fairseq.data.languages import get_language
from mhmoe_fairseq.prepare.multilingual.filters import LineFilter, reads_like_english
from mhmoe_fairseq.prepare.multilingual.scripts import fits, foreign_letters, letters_by_script, script_of
from mhmoe_fairseq.prepare.multilingual.spot_check import spot_check


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


def test_verdicts_are_counted():
    english = SeenTexts()
    english.add("LibreOffice Writer Guide")
    counts = Counter()
    judge = LineFilter(get_language("de"), english, counts)
    lines = {
        "Die Datei wird geöffnet.": True,
        "LibreOffice Writer Guide": False,
        "This is the file that you open.": False,
        "OK": False,
        "Запустите программу": False,
    }
    assert {line: judge.keep(line) for line in lines} == lines
    assert counts == {"kept_lines": 1, "english_lines": 2, "short_lines": 1, "other_script_lines": 1}


def test_english_is_not_filtered_out_of_english():
    english = SeenTexts()
    english.add("This is the file that you open.")
    assert LineFilter(get_language("en"), english, Counter()).keep("This is the file that you open.")


def test_ideographs_count_for_more_than_a_letter():
    judge = LineFilter(get_language("zh"), (), Counter())
    assert judge.keep("打开文件") and not judge.keep("打开")


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

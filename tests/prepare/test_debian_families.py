"""Every family of Debian packages, read from tiny packages in the real layout."""

import gzip
import json

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare.sources.debian_docs import FAMILIES


def read(name, path, languages):
    """``(language, document, unit, key, lines)`` of every passage."""
    passages = FAMILIES[name].read(path, languages)
    return [(language, one.document, one.unit, one.key, one.lines) for language, one in passages]


def test_wiki_messages_by_key(make_deb):
    path = make_deb(
        "mediawiki",
        {
            "mediawiki/languages/i18n/de.json": json.dumps({"@metadata": {}, "ok": "'''Gut'''\nso", "n": ["no"]}),
            "mediawiki/languages/i18n/zh-hans.json": json.dumps({"ok": "好"}),
            "mediawiki/languages/i18n/zh-hant.json": json.dumps({"ok": "no"}),
            "mediawiki/extensions-core/Nuke/i18n/api/de.json": json.dumps({"ok": "Ja"}),
            "mediawiki/languages/i18n/fr.json": json.dumps({"ok": "Bien"}),
        },
    )
    assert read("mediawiki", path, ("de", "zh")) == [
        ("de", "extensions-core/Nuke/api", "extensions-core/Nuke/api:ok", "extensions-core/Nuke/api:ok", ["Ja"]),
        ("de", "languages", "languages:ok", "languages:ok", ["Gut", "so"]),
        ("zh", "languages", "languages:ok", "languages:ok", ["好"]),
    ]


def test_libreoffice_messages_and_their_english(make_deb, make_catalogue):
    catalogue = make_catalogue({"page|tip|a\x04_Save": "S_peichern", "page|b\x04Open": "Öffnen", "STR\x04Close": "Zu"})
    path = make_deb("libreoffice-l10n-de", {"x/resource/de/LC_MESSAGES/sw.mo": catalogue})
    found = read("lo-ui", path, ("de", "en"))
    assert [(language, unit, lines) for language, _, unit, _, lines in found] == [
        ("de", "sw:STR", ["Zu"]), ("en", "sw:STR", ["Close"]),
        ("de", "sw:page", ["Öffnen"]), ("en", "sw:page", ["Open"]),
        ("de", "sw:page", ["Speichern"]), ("en", "sw:page", ["Save"]),
    ]  # fmt: skip
    keys = [key for _, _, _, key, _ in found]
    assert keys[0::2] == keys[1::2] and len(set(keys)) == 3
    assert [language for language, *_ in read("lo-ui", path, ("en",))] == ["en"] * 3
    assert FAMILIES["lo-ui"].packages_for(["en"]) == {"libreoffice-l10n-de": ("en",)}


def test_libreoffice_help_by_paragraph(make_deb):
    page = """<html><body><header><p>no</p></header><div id="DisplayArea" x="y"><h1 id="hd_id1">Titel</h1>
    <p id="par_id2" class="p">Drücken Sie
    <span hidden="true" id="MACtext" class="MAC"><span class="k">Befehl</span></span>
    <span hidden="true" id="defaulttext"><span class="k">Strg</span></span>.</p><p>Ohne Nummer</p>
    <p>[text/a/b.xhp#c not found]</p></div>
    <div id="SearchFrame"></div><footer><p>no</p></footer></body></html>"""
    path = make_deb("libreoffice-help-de", {"libreoffice/help/de/text/swriter/guide/a.html": page})
    assert read("lo-help", path, ("de",)) == [
        ("de", "swriter/guide/a", "swriter/guide/a", "swriter/guide/a#hd_id1", ["Titel"]),
        ("de", "swriter/guide/a", "swriter/guide/a", "swriter/guide/a#par_id2", ["Drücken Sie Strg."]),
        ("de", "swriter/guide/a", "swriter/guide/a", None, ["Ohne Nummer"]),
    ]


def test_word_press_locales(make_deb, make_catalogue):
    catalogues = {"de_DE": "Gut gemacht", "sw": "Vizuri sana", "es_PE": "no", "admin-de_DE": "Verwaltung"}
    catalogues |= {"bsw": "no", "admin-arde": "no", "fsw_SW": "no"}  # of other languages, with as many letters behind
    files = {f"x/languages/{name}.mo": make_catalogue({"Well": text}) for name, text in catalogues.items()}
    path = make_deb("wordpress-l10n", files)
    found = read("wordpress", path, ("de", "en", "es", "sw"))
    assert [(language, document, lines) for language, document, _, _, lines in found] == [
        ("de", "admin", ["Verwaltung"]), ("en", "admin", ["Well"]),
        ("de", "", ["Gut gemacht"]), ("en", "", ["Well"]), ("sw", "", ["Vizuri sana"]),
    ]  # fmt: skip


def test_manual_pages_keep_long_paragraphs(make_deb):
    english = ".TH LS 1\n.SH NAME\nls\n.PP\nList information about the files, the current folder by default.\n"
    german = ".TH LS 1\n.PP\nInformationen über die Dateien auflisten, vorgegeben ist der aktuelle Ordner.\n"
    files = {
        "man/man1/ls.1.gz": gzip.compress(english.encode()),
        "man/de/man1/ls.1.gz": gzip.compress(german.encode()),
        "man/zh_CN/man1/ls.1": ".PP\n列出文件的信息，默认为当前目录。\n",
        "man/zh_TW/man1/ls.1": ".PP\n列出檔案的資訊，預設為目前目錄。\n",
        "man/de/man1/old.1.gz": gzip.compress(german.encode("latin-1")),
        "man/de/man1/empty.1": ".TH X\n",
    }
    found = read("manpages", make_deb("manpages-de", files), ("de", "en", "zh"))
    assert [(language, unit, key) for language, _, unit, key, _ in found] == [
        ("de", "man1/ls.1", None), ("en", "man1/ls.1", None), ("zh", "man1/ls.1", None),
    ]  # fmt: skip
    assert found[1][-1] == ["List information about the files, the current folder by default."]


@pytest.mark.parametrize(
    "family, package, file, expected",
    [
        ("d-i-guide", "installation-guide-amd64", "doc/installation-guide-amd64/zh_CN/ch01.html", "ch01"),
        ("gnome-docs", "gnome-user-docs", "help/zh_CN/gnome-help/a11y.page", "gnome-help/a11y"),
        ("debian-reference", "debian-reference-zh-cn", "debian-reference/ch01.zh-cn.html", "ch01"),
        ("handbook", "debian-handbook", "doc/debian-handbook/html/zh-CN/case.html", "case"),
    ],
)
def test_manuals_by_page(make_deb, family, package, file, expected):
    path = make_deb(package, {file: "<html><body><p>第一段</p><p>第二段</p></body></html>"})
    assert read(family, path, ("de", "zh")) == [("zh", expected, expected, None, ["第一段", "第二段"])]


def test_damaged_members_are_named(make_deb):
    path = make_deb("mediawiki", {"mediawiki/languages/i18n/de.json": "{"})
    with pytest.raises(UserError, match=r"mediawiki_1\.0-1_all\.deb: languages is not valid JSON"):
        read("mediawiki", path, ("de",))
    path = make_deb("manpages-de", {"man/de/man1/ls.1.gz": b"no gzip"})
    with pytest.raises(UserError, match=r"damaged member .*ls\.1\.gz"):
        read("manpages", path, ("de",))


def test_all_papers_languages_have_two_families_at_least():
    counts = {
        code: sum(bool(family.packages_for([code])) for family in FAMILIES.values())
        for code in "bg de el en es fr hi ru sw th tr ur vi zh".split()
    }
    assert min(counts.values()) >= 3 and counts["sw"] == 3 and counts["de"] == len(FAMILIES)

"""Text out of HTML, Mallard, wiki text, programs' messages, gettext catalogues, CLDR and roff."""

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare.sources import debian_formats as formats


@pytest.mark.parametrize(
    "message, lines",
    [
        ("{{PLURAL:$1|ein Eintrag|$1 Einträge}} gefunden", ["… Einträge gefunden"]),
        ("{{PLURAL:$1|1=ein|mehrere {{GENDER:$2|Autoren|Autorinnen}}}}", ["mehrere Autoren"]),
        ("Siehe [[Special:Log|das Logbuch]] und [[Hilfe]].", ["Siehe das Logbuch und Hilfe."]),
        ("'''Fett''' und ''kursiv'' in {{SITENAME}}", ["Fett und kursiv in Wiki"]),
        ("== Titel ==\n* <strong>Punkt</strong> &amp; mehr\n\n", ["Titel", "Punkt & mehr"]),
        ("[https://example.org die Seite] und [$1 das Ziel]", ["die Seite und das Ziel"]),
        ("{{GRAMMAR:genitive|Wiki}} hat {{int:nothing}} $1", ["Wiki hat …"]),
        ("{{PLURAL:$1|offen", ["{{PLURAL:…|offen"]),
    ],
)
def test_wiki_text(message, lines):
    assert formats.wiki_text(message) == lines


@pytest.mark.parametrize(
    "message, text",
    [
        ("H_inzufügen", "Hinzufügen"),
        ("file_name_here and more", "file_name_here and more"),
        ("打开(_O)...", "打开..."),
        ("~Datei öffnen", "Datei öffnen"),
        ("%PRODUCTNAME startet <b>%1</b> von $(ARG1)", "LibreOffice startet … von …"),
        ("%1$s hat %d Dateien (100 % fertig)", "… hat … Dateien (100 % fertig)"),
        ("Zeile&nbsp;eins\\nZeile zwei", "Zeile eins Zeile zwei"),
    ],
)
def test_messages_of_programs(message, text):
    assert formats.message_text(message) == text


def test_blocks_of_html():
    page = """<html><head><title>no</title></head><body><nav><p>no</p></nav>
    <h1 id="hd_1">A <em>heading</em></h1><p id="par_1">First
    line &amp; more</p><pre><code>no(code);</code></pre><ul><li>One<li>Two</ul><!-- <p>no</p> -->
    <script>if (a < b) no();</script>a &lt; b</body></html>"""
    assert list(formats.blocks(page)) == [
        ("hd_1", "A heading"), ("par_1", "First line & more"), ("", "One"), ("", "Two"), ("", "a < b"),
    ]  # fmt: skip


def test_blocks_of_mallard():
    page = """<page><info><credit type="author"><name>Somebody</name></credit><desc>Short <app>Orca</app> note.</desc>
    </info><title>Title</title><p>Press <key>A</key>.</p><screen>no</screen>
    <media type="image" src="x"/><p>End</p></page>"""
    assert [text for _, text in formats.blocks(page)] == ["Short Orca note.", "Title", "Press A.", "End"]


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogue(make_catalogue, order):
    content = make_catalogue({"dialog|ok\x04_Fine": "_Gut", "one\0many": "eins\0viele"}, order)
    messages = list(formats.read_catalogue(content, "x.mo"))
    assert sorted(messages) == [("", "many", "viele"), ("dialog|ok", "_Fine", "_Gut")]


@pytest.mark.parametrize("content", [b"", b"no catalogue", b"\xde\x12\x04\x95\0\0\0\0\xff\0\0\0\xff\0\0\0"])
def test_a_damaged_catalogue_is_named(content):
    with pytest.raises(UserError, match=r"^x\.mo: not a gettext catalogue"):
        list(formats.read_catalogue(content, "x.mo"))


def test_emoji_names_with_their_keywords():
    xml = """<annotations><annotation cp="🐤">bird | chick | pet</annotation>
    <annotation cp="🐤" type="tts">chick</annotation><annotation cp="👍🏽" type="tts">thumbs &amp; tone</annotation>
    <annotation cp="x">keywords | only</annotation></annotations>"""
    assert list(formats.annotation_lines(xml)) == [("1f424", "chick: bird, pet"), ("1f44d-1f3fd", "thumbs & tone")]


PAGE = r"""'\" t
.\" a comment that is no text
.TH LS 1 "September"
.ig
 a licence that is no text
..
.SH NAME
ls \- list
.SH DESCRIPTION
List \fIinformation\fP about the files\(em\c
all \[lq]of\[rq] them.
.\" inside
See
.BR stat (2)
for more.
.nf
int no_code;
.fi
.TP
\fB\-a\fP, \fB\-\-all\fP
do not ignore entries
.TS
no table
.TE

After an empty line.
"""


def test_paragraphs_of_a_manual_page():
    assert list(formats.manual_paragraphs(PAGE)) == [
        "ls - list",
        "List information about the files— all “of” them. See stat (2) for more.",
        "-a, --all",
        "do not ignore entries",
        "After an empty line.",
    ]


@pytest.mark.parametrize("page", [".so man1/other.1\n", ".Dd May 1\n.Sh NAME\nmdoc is another language\n"])
def test_pages_that_are_left_out(page):
    assert list(formats.manual_paragraphs(page)) == []

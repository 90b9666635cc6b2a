"""A report as one HTML file for any browser, without network or other files: its Markdown, with the plots inside."""

import base64
import html
import mimetypes
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: .2rem .6rem; white-space: nowrap; }
th { background: #f3f3f3; }
.number { text-align: right; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
img { max-width: 100%; }
"""
_IMAGE = re.compile(r"!\[(?P<title>.*)\]\((?P<file>.+)\)")
_INLINE = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"\[([^\]]+)\]\((https?://[^)\s]+)\)"), r'<a href="\2">\1</a>'),
)


def html_page(text: str, folder: Path) -> str:
    """Returns the page that says what ``text`` says, the Markdown of a report whose images lie below ``folder``.

    Headings, tables, lists, code, images and paragraphs are known, each block between empty lines.
    """
    title = html.escape(text.split("\n", 1)[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = "\n".join(_block(block, folder) for block in _blocks(text))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines between empty ones; code keeps its empty lines."""
    block: list[str] = []
    for line in text.splitlines():
        if line or (block and block[0].startswith("```") and block.count("```") == 0):
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _block(lines: list[str], folder: Path) -> str:
    first = lines[0]
    if first.startswith("```"):
        return f"<pre>{html.escape(chr(10).join(line for line in lines[1:] if line != '```'))}</pre>"
    if first.startswith("#"):
        level = len(first) - len(first.lstrip("#"))
        return f"<h{level}>{_inline(first.lstrip('# '))}</h{level}>"
    if found := _IMAGE.fullmatch(first):
        file = folder / found["file"]
        content = base64.b64encode(file.read_bytes()).decode()
        kind = mimetypes.guess_type(file.name)[0]
        return f'<img alt="{html.escape(found["title"])}" src="data:{kind};base64,{content}">'
    if first.startswith("|"):
        return _table(lines)
    parts = []
    for is_item, run in groupby(lines, lambda line: line.startswith("- ")):
        if is_item:
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in run) + "</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(run))}</p>")
    return "\n".join(parts)


def _table(lines: list[str]) -> str:
    """A table of Markdown; its second line tells which columns are numbers."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    classes = [' class="number"' if rule.endswith(":") else "" for rule in rows[1]]

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in zip(cells, classes)) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows[2:])
    return f"<table><thead>{row(rows[0], 'th')}</thead>\n<tbody>{body}</tbody></table>"


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    for pattern, replacement in _INLINE:
        escaped = pattern.sub(replacement, escaped)
    return escaped

"""Prose out of documentation: docstrings of installed packages, and the kernel's out of a Debian package.

Both are reStructuredText for the most part: one line per paragraph that reads like sentences.
"""

import ast
import importlib.util
import platform
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...common.provenance import versions
from ...data.documents import Document
from ..archives import Archive, Say, iter_deb_members, iter_zip_members
from .base import ENGLISH_SOURCES, OpenedText, PackagedSource, Source, SourceKind

_ROLE = re.compile(r":[\w+.:-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_QUOTES = re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?!\w)")
_UNDERLINE = re.compile(r"^\s*([=\-~^\"'#*+.:_`])\1{2,}\s*$")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+")
_FIELD = re.compile(r"^\s*:[\w .-]+:(?:\s+|$)")
_CODE = re.compile(r"[{};]\s*$|==|->|=>|::|&&|<<|>>|\\\w|[|$#@^~{}]")
_MIN_WORDS = 8
_MIN_LETTERS = 0.85


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs of reStructuredText that read like sentences, as one line without markup.

    Directives, literal blocks, tables, comments and headings are left out. A bullet starts a new paragraph.
    """
    block: list[str] = []
    skip_deeper_than: int | None = None
    for line in [*text.expandtabs().splitlines(), ""]:
        indent = _indent(line)
        if line.strip() and skip_deeper_than is not None:
            if indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        starts_item = bool(_BULLET.match(line) or _FIELD.match(line))
        if (not line.strip() or starts_item) and block:
            if block[-1].rstrip().endswith("::"):
                skip_deeper_than = min(map(_indent, block))
            paragraph = _LINK.sub(r"\1", _ROLE.sub(r"\1", " ".join(block)))
            paragraph = _EMPHASIS.sub(r"\2", _QUOTES.sub(r"\1", paragraph)).replace("::", ":")
            if is_prose(paragraph := " ".join(paragraph.split())):
                yield paragraph
            block = []
        if not line.strip():
            continue
        if line.lstrip().startswith(".. ") or line.strip() == "..":
            skip_deeper_than = indent
        elif _UNDERLINE.match(line):
            block = []  # the line above was a heading
        else:
            block.append(_FIELD.sub("", _BULLET.sub("", line)) if starts_item else line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences: enough words, mostly letters, an end mark, no signs of code."""
    if len(paragraph.split()) < _MIN_WORDS or not re.search(r"[.!?:](\s|\)|\"|$)", paragraph):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return letters >= _MIN_LETTERS * len(paragraph) and not _CODE.search(paragraph)


DEFAULT_PACKAGES = ("stdlib", "numpy", "scipy", "scikit-learn", "torch", "sympy")
_IMPORT_NAMES = {"scikit-learn": "sklearn"}
_SKIPPED_FOLDERS = frozenset("tests test _internal idlelib lib2to3 site-packages __pycache__ _vendor".split())
_DOCTEST = re.compile(r"(?m)^[ \t]*(>>>|\.\.\. ).*$")
_PARAMETER = re.compile(r"(?m)^[ \t]*[*\w][\w*, .]* : .*$")  # numpydoc's "name : type" lines
_LONG_STRING = 200  # add_docstr and pydoc topics are plain strings, not docstrings


@dataclass(frozen=True)
class DocstringSource(Source):
    """Docstrings of installed distributions (``stdlib`` is Python's own library), which are parsed, never imported."""

    packages: tuple[str, ...] = DEFAULT_PACKAGES
    name: str = "docstrings"
    licence: str = "PSF (stdlib) and BSD-3-Clause (numpy, scipy, scikit-learn, torch, sympy)"
    unit: str = "document = module, line = paragraph"

    def identity(self) -> dict[str, object]:
        """Returns the version of every package; ``UserError`` names one that is not installed."""
        return {"packages": {package: _version(package) for package in self.packages}}

    def open(self, cache_dir: Path, say: Say) -> OpenedText:
        """Returns versions and documents of the installed modules; nothing is fetched."""
        folders = {package: _folder(package) for package in self.packages}
        unread: list[str] = []  # filled while the documents are read, which is before the manifest is written
        documents = (text for package in folders for text in docstring_documents(package, folders[package], unread))
        version = f"Python {platform.python_version()}"
        return {"version": version, **self.identity(), "unparsable_modules": unread}, documents


def _version(package: str) -> str:
    name = "python" if package == "stdlib" else package
    found = versions([package])
    if name not in found:
        raise UserError(f"--docstring-packages: {package} is not installed here; leave it out or install it")
    return found[name]


def _folder(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(_IMPORT_NAMES.get(package, package.replace("-", "_")))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--docstring-packages: {package} is not a package with modules")
    return Path(next(iter(spec.submodule_search_locations)))


def docstring_documents(package: str, folder: Path, unread: list[str]) -> Iterator[Document]:
    """Yields a document per module, no tests or vendored ones; ``unread`` takes the names of what does not parse."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            continue
        yield from _module_document(f"{package}/{relative.as_posix()}", path.read_bytes(), unread)


def wheel_documents(package: str, path: Path) -> Iterator[Document]:
    """Yields a document per module of a package in a wheel, no tests; what this Python cannot parse is left out."""
    for name, content in iter_zip_members(path, lambda name: name.startswith(f"{package}/") and name.endswith(".py")):
        if _SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            yield from _module_document(name, content, [])


def _module_document(name: str, source: bytes, unread: list[str]) -> Iterator[Document]:
    try:
        texts = [_PARAMETER.sub("", _DOCTEST.sub("", docstring)) for docstring in _docstrings(source.decode())]
        "".join(texts).encode()  # half a surrogate pair, written as an escape, is no text
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        unread.append(name)
        return
    yield Document(name, [paragraph for text in texts for paragraph in prose_paragraphs(text)])


def _docstrings(source: str) -> Iterator[str]:
    """Yields docstrings and other long strings; raises what the parser raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    docstring_nodes: set[int] = set()
    for node in ast.walk(tree):  # breadth first: a definition comes before the string in its body
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                docstring_nodes.add(id(node.body[0].value))  # type: ignore[attr-defined]
                yield docstring
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > _LONG_STRING:
            if id(node) not in docstring_nodes:
                yield node.value


_ROOT = "/Documentation/"


def linux_documents(path: Path) -> Iterator[Document]:
    """Yields the English ``.rst`` and ``.txt`` files under ``Documentation`` of the package at ``path``."""
    for name, content in iter_deb_members(path, _is_wanted):
        yield Document(name.split(_ROOT, 1)[1], list(prose_paragraphs(content.decode("utf-8", "replace"))))


def _is_wanted(name: str) -> bool:
    _, root, relative = name.removesuffix(".gz").partition(_ROOT)
    return bool(root) and relative.endswith((".rst", ".txt")) and not relative.startswith("translations/")


def linux_doc(package: str) -> PackagedSource:
    """Returns the kernel's documentation as Debian packages it (``linux-doc-6.1`` on Debian 12); its version moves."""
    return PackagedSource(
        name="linux-doc",
        licence="GPL-2 (mostly; see the package's copyright file)",
        unit="document = documentation file, line = paragraph",
        archive=Archive("apt-get", package, None, f"{package}_*.deb"),
        read=linux_documents,
    )


_PACKAGES = {
    "type": nonempty, "nargs": "+", "default": list(DEFAULT_PACKAGES), "metavar": "NAME", "help": "for docstrings",
}  # fmt: skip
_NAME = {"type": nonempty, "default": "linux-doc-6.1", "metavar": "NAME", "help": "for linux-doc: its name here"}
ENGLISH_SOURCES["docstrings"] = SourceKind(
    lambda args: DocstringSource(tuple(args.docstring_packages)), flags={"--docstring-packages": _PACKAGES}
)
ENGLISH_SOURCES["linux-doc"] = SourceKind(lambda args: linux_doc(args.deb_package), flags={"--deb-package": _NAME})

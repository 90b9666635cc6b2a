"""Docstrings of packages that are installed anyway: no download, one document per module, one line per paragraph.

Modules are parsed, never imported. The text depends on the packages' versions, which are part of the identity.
"""

import ast
import importlib.util
import platform
import re
import sysconfig
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Iterator

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...data.documents import Document
from .base import ENGLISH_SOURCES, OpenedSource, Say, Source, SourceKind
from .prose import prose_lines

DEFAULT_PACKAGES = ("stdlib", "numpy", "scipy", "scikit-learn", "torch", "sympy")
_IMPORT_NAMES = {"scikit-learn": "sklearn"}
_LICENCES = "PSF (stdlib) and BSD-3-Clause (numpy, scipy, scikit-learn, torch, sympy)"
_SKIPPED_FOLDERS = frozenset("tests test _internal idlelib lib2to3 site-packages __pycache__ _vendor".split())
_DOCTEST = re.compile(r"(?m)^[ \t]*(>>>|\.\.\. ).*$")
_PARAMETER = re.compile(r"(?m)^[ \t]*[*\w][\w*, .]* : .*$")  # numpydoc's "name : type" lines
_LONG_STRING = 200  # add_docstr and pydoc topics are plain strings, not docstrings


@dataclass(frozen=True)
class DocstringSource(Source):
    """Docstrings of the named distributions (``stdlib`` is Python's own library)."""

    packages: tuple[str, ...] = DEFAULT_PACKAGES
    name: str = "docstrings"
    licence: str = _LICENCES
    unit: str = "document = module, line = paragraph"

    def identity(self) -> dict[str, object]:
        """Returns the version of every package; ``UserError`` names one that is not installed."""
        return {"packages": {package: _version(package) for package in self.packages}}

    def open(self, cache_dir: Path, say: Say) -> OpenedSource:
        """Reads the installed modules; nothing is fetched."""
        folders = [(package, _folder(package)) for package in self.packages]
        unread: list[str] = []  # filled while the documents are read, which is before the manifest is written
        return OpenedSource(
            {"version": f"Python {platform.python_version()}", **self.identity(), "unparsable_modules": unread},
            (document for package, folder in folders for document in docstring_documents(package, folder, unread)),
        )


def _version(package: str) -> str:
    if package == "stdlib":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise UserError(f"--docstring-packages: {package} is not installed here; leave it out or install it") from error


def _folder(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(_IMPORT_NAMES.get(package, package.replace("-", "_")))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--docstring-packages: {package} is not a package with modules")
    return Path(next(iter(spec.submodule_search_locations)))


def docstring_documents(package: str, folder: Path, unread: list[str]) -> Iterator[Document]:
    """Yields one document per module under ``folder``; tests and vendored packages are left out.

    Args:
        unread: takes the names of modules that do not parse (templates, other versions of Python).
    """
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            continue
        name = f"{package}/{relative.as_posix()}"
        try:
            docstrings = list(_docstrings(path))
        except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            unread.append(name)
            continue
        texts = (_PARAMETER.sub("", _DOCTEST.sub("", docstring)) for docstring in docstrings)
        yield Document(name, [line for text in texts for line in prose_lines(text)])


def _docstrings(path: Path) -> Iterator[str]:
    """Yields docstrings and other long strings; raises what the parser raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring_nodes: set[int] = set()
    for node in ast.walk(tree):  # breadth first: a definition comes before the string in its body
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                docstring_nodes.add(id(node.body[0].value))  # type: ignore[attr-defined]
                yield docstring
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > _LONG_STRING:
            if id(node) not in docstring_nodes:
                yield node.value


_PACKAGES = {
    "type": nonempty, "nargs": "+", "default": list(DEFAULT_PACKAGES), "metavar": "NAME", "help": "for docstrings",
}  # fmt: skip
ENGLISH_SOURCES["docstrings"] = SourceKind(
    lambda args: DocstringSource(tuple(args.docstring_packages)), flags={"--docstring-packages": _PACKAGES}
)

"""Lists of mutants: reading them, finding the place that each one names, and the source with the change in it.

A list is a TOML file::

    tests = ["tests/moe"]             # what runs for its mutants: files, folders or node ids

    [[mutant]]
    change = "the layer's output dropout is never applied"
    function = "MHMoELayer.forward"   # qualified name, looked for in the whole package
    expression = "F.dropout(y_TD, self.config.dropout, self.training)"
    becomes = "y_TD"

``expression`` is an expression or one statement of the function, compared by its syntax tree; ``becomes`` may be
several statements in place of one. Also ``occurrence`` (from 1) where it stands there more than once, ``module``
(``moe.layer``, or ``moe`` for all below) where several functions have that name, ``tests`` of this mutant alone, and
``survives``: why no test can see it. ``function = ""`` is the module's own level, a class's name the class's own,
without the functions in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    raise SystemExit("mutate: error: the lists of mutants are TOML, which Python reads from 3.11 on") from None

LISTS = Path("scripts/mutants")
PACKAGE = Path("mhmoe_fairseq")
_FIELDS = {"change", "function", "module", "expression", "becomes", "occurrence", "tests", "survives"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class ListError(ValueError):
    """A list that does not fit the package: the list, the mutant, what is wrong."""


@dataclass(frozen=True)
class Mutant:
    """One change of one place; fields as in the lists.

    Attributes:
        list_name: the list it is from, ``moe`` for moe.toml.
    """

    list_name: str
    change: str
    function: str
    expression: str
    becomes: str
    tests: tuple[str, ...]
    module: str = ""
    occurrence: int | None = None
    survives: str = ""

    def fail(self, problem: str) -> ListError:
        return ListError(f"{LISTS / self.list_name}.toml: {self.change!r}: {problem}")


@dataclass(frozen=True)
class Mutation:
    """A mutant and where it is.

    Attributes:
        path: the file, relative to the checkout.
        before, after: its whole source, unchanged and changed.
    """

    mutant: Mutant
    path: Path
    before: str
    after: str

    def digest(self, root: Path) -> str:
        """Changes with the file, the mutant or its tests."""
        mutant = self.mutant
        parts = (self.before, mutant.function, mutant.expression, mutant.becomes, str(mutant.occurrence))
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in _test_files(self.mutant, root):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def read_lists(root: Path, names: Sequence[str] = ()) -> list[Mutant]:
    """All mutants of the named lists, by default of every one, in the files' order."""
    files = sorted((root / LISTS).glob("*.toml"))
    unknown = sorted(set(names) - {file.stem for file in files})
    if unknown:
        raise ListError(f"no list {unknown[0]!r} in {LISTS}: {', '.join(file.stem for file in files)}")
    mutants = [mutant for file in files if not names or file.stem in names for mutant in _read_list(file)]
    changes = [mutant.change for mutant in mutants]
    for mutant in mutants:
        if changes.count(mutant.change) > 1:
            raise mutant.fail("another mutant has the same words")
    return mutants


def _read_list(file: Path) -> Iterator[Mutant]:
    where = LISTS / file.name
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ListError(f"{where}: {error}") from None
    default = content.get("tests", [])
    for entry in content.get("mutant", []):
        label = entry.get("change", "a mutant without 'change'")
        missing, unknown = {"change", "function", "expression", "becomes"} - set(entry), set(entry) - _FIELDS
        if missing or unknown:
            raise ListError(f"{where}: {label!r}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        tests = tuple(entry.get("tests", default))
        if not tests:
            raise ListError(f"{where}: {label!r}: neither it nor the list names tests")
        yield Mutant(**{**entry, "list_name": file.stem, "tests": tests})


def locate_all(mutants: Sequence[Mutant], root: Path) -> list[Mutation]:
    """The place of each.

    Raises:
        ListError: a line for every mutant that has none.
    """
    mutations, problems = [], []
    for mutant in mutants:
        try:
            mutations.append(locate(mutant, root))
        except ListError as error:
            problems.append(str(error))
    if problems:
        raise ListError("\n".join(problems))
    return mutations


def locate(mutant: Mutant, root: Path) -> Mutation:
    """The one place that ``mutant`` names.

    Raises:
        ListError: if it is not there exactly once, if nothing changes, or if the tests are not there.
    """
    _check_tests(mutant, root)
    wanted, replacement = _parse(mutant, "expression"), _parse(mutant, "becomes")
    if len(wanted) != 1:
        raise mutant.fail("'expression' must be one expression or one statement")
    is_expression = isinstance(wanted[0], ast.Expr) and len(replacement) == 1 and isinstance(replacement[0], ast.Expr)
    target = wanted[0].value if is_expression else wanted[0]
    files = _files(mutant, root)
    if not files:
        raise mutant.fail(f"no function {mutant.function!r} in {mutant.module or PACKAGE}")
    counts = [(path, _Replace(mutant.function, target, target, 0).count(_parsed(root / path))) for path in files]
    places = [(path, count) for path, count in counts if count]
    if not places:
        raise mutant.fail(f"{mutant.expression!r} is not in {mutant.function!r}")
    if len(places) > 1:
        raise mutant.fail(f"several modules have it: {', '.join(str(path) for path, _ in places)}; name 'module'")
    [(path, count)] = places
    if mutant.occurrence is None and count > 1:
        raise mutant.fail(f"the expression stands there {count} times; name 'occurrence'")
    if not 1 <= (mutant.occurrence or 1) <= count:
        raise mutant.fail(f"'occurrence' is {mutant.occurrence}; the expression stands there {count} times")
    before, tree = _source(root / path), _parsed(root / path)
    new = replacement[0].value if is_expression else replacement
    after = _Replace(mutant.function, target, new, mutant.occurrence or 1).changed(tree)
    if after == ast.unparse(tree):
        raise mutant.fail("'becomes' changes nothing")
    return Mutation(mutant, path, before, after + "\n")


def _parse(mutant: Mutant, field: str) -> list[ast.stmt]:
    try:
        return ast.parse(getattr(mutant, field).strip()).body
    except SyntaxError as error:
        raise mutant.fail(f"'{field}' is not Python: {error}") from None


def _test_files(mutant: Mutant, root: Path) -> list[Path]:
    paths = [root / test.partition("::")[0] for test in mutant.tests]
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def _check_tests(mutant: Mutant, root: Path) -> None:
    for test in mutant.tests:
        file, _, name = test.partition("::")
        function = name.rpartition("::")[2].partition("[")[0]
        if not (root / file).exists() or function and f"def {function}(" not in _source(root / file):
            raise mutant.fail(f"there is no test {test}")


def _files(mutant: Mutant, root: Path) -> list[Path]:
    """The files, relative to ``root``, that have a function, a class or (empty name) code of their own of that name."""
    modules = {path: ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts) for path in _package(root)}
    return [
        path.relative_to(root)
        for path, module in modules.items()
        if (not mutant.module or f"{module}.".startswith(f"{mutant.module}.")) and mutant.function in _names(path)
    ]


@functools.cache
def _package(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


@functools.cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(_source(path))


@functools.cache
def _names(path: Path) -> frozenset[str]:
    """Qualified names of all that a file defines; the file itself is the empty name."""
    names, waiting = {""}, [("", _parsed(path))]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}" if isinstance(child, _SCOPES) else ""
            names.add(name)
            waiting.append((f"{name}." if name else prefix, child))
    return frozenset(names)


class _Replace(ast.NodeTransformer):
    """Puts ``new`` in place of the ``number``-th node inside ``function`` that reads like ``target``; 0: of none."""

    def __init__(self, function: str, target: ast.AST, new: ast.AST | list[ast.stmt], number: int) -> None:
        self._function, self._new, self._number = function, new, number
        self._type, self._text = type(target), ast.unparse(target)
        self._path: list[ast.AST] = []
        self._found = 0

    def count(self, tree: ast.Module) -> int:
        """How many nodes read like ``target``."""
        self.visit(tree)
        return self._found

    def changed(self, tree: ast.Module) -> str:
        """The source of ``tree`` with the change; ``tree`` stays as it is."""
        copy = ast.parse(ast.unparse(tree))
        return ast.unparse(ast.fix_missing_locations(self.visit(copy)))

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        if self._is_inside() and isinstance(node, self._type) and ast.unparse(node) == self._text:
            self._found += 1
            if self._found == self._number:
                return self._new
        is_scope = isinstance(node, _SCOPES)
        if is_scope:
            self._path.append(node)
        self.generic_visit(node)
        if is_scope:
            self._path.pop()
        return node

    def _is_inside(self) -> bool:
        """Within the function, those nested in it included; of a class or module only its own level."""
        for depth, scope in enumerate(self._path, 1):
            if ".".join(node.name for node in self._path[:depth]) == self._function:
                return not isinstance(scope, ast.ClassDef) or depth == len(self._path)
        return not self._function and not self._path

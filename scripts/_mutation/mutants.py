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
    counts = {path: count for path in _package(root) if (count := _count(mutant, path, root, target)) is not None}
    if not counts:
        raise mutant.fail(f"no function {mutant.function!r} in {mutant.module or PACKAGE}")
    places = [path.relative_to(root) for path, count in counts.items() if count]
    if not places:
        raise mutant.fail(f"{mutant.expression!r} is not in {mutant.function!r}")
    if len(places) > 1:
        raise mutant.fail(f"several modules have it: {', '.join(map(str, places))}; name 'module'")
    count, before = counts[root / places[0]], _source(root / places[0])
    if mutant.occurrence is None and count > 1:
        raise mutant.fail(f"the expression stands there {count} times; name 'occurrence'")
    if not 1 <= (mutant.occurrence or 1) <= count:
        raise mutant.fail(f"'occurrence' is {mutant.occurrence}; the expression stands there {count} times")
    tree = ast.parse(before)
    unchanged = ast.unparse(tree)
    place = _matches(_scopes(tree)[mutant.function], target)[(mutant.occurrence or 1) - 1]
    after = ast.unparse(_Replace(place, replacement[0].value if is_expression else replacement).visit(tree))
    if after == unchanged:
        raise mutant.fail("'becomes' changes nothing")
    return Mutation(mutant, places[0], before, after + "\n")


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


def _count(mutant: Mutant, path: Path, root: Path, target: ast.AST) -> int | None:
    """How often ``target`` stands in the mutant's function; None where the file has no such function."""
    module = ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts)
    if mutant.module and not f"{module}.".startswith(f"{mutant.module}."):
        return None
    scope = _parsed(path).get(mutant.function)
    return None if scope is None else len(_matches(scope, target))


@functools.cache
def _package(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


@functools.cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _parsed(path: Path) -> dict[str, ast.AST]:
    return _scopes(ast.parse(_source(path)))


def _scopes(node: ast.AST, name: str = "") -> dict[str, ast.AST]:
    """All that a file defines, by qualified name; the file itself has the empty name."""
    found = {name: node} if isinstance(node, (ast.Module, *_SCOPES)) else {}
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}".lstrip(".") if isinstance(child, _SCOPES) else name
        found = {**_scopes(child, inner), **found}
    return found


def _matches(scope: ast.AST, target: ast.AST) -> list[ast.AST]:
    """The nodes that read like ``target``, in the source's order; of a class or a file, its own level only."""
    text = ast.unparse(target)

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if type(child) is type(target) and ast.unparse(child) == text:
                yield child
            if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) or not isinstance(child, _SCOPES):
                yield from walk(child)

    return list(walk(scope))


class _Replace(ast.NodeTransformer):
    """Puts ``new`` in place of one node."""

    def __init__(self, place: ast.AST, new: ast.AST | list[ast.stmt]) -> None:
        self._place, self._new = place, new

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        return self._new if node is self._place else self.generic_visit(node)

"""Lists of mutants: reading them, finding what each names, and the source with the change in it.

A list is a TOML file::

    tests = ["tests/moe"]             # what runs for its mutants: files, folders or node ids
    needs = ["tokenizers"]            # modules without which the tests are skipped, and the mutants not run; if any

    [[mutant]]
    change = "the layer's output dropout is never applied"
    function = "MHMoELayer.forward"   # qualified name, looked for in the whole package
    expression = "F.dropout(y_TD, self.config.dropout, self.training)"
    becomes = "y_TD"

``expression`` is an expression or one statement of the function, compared by its syntax tree; ``becomes`` may be
several statements in place of one. Also ``occurrence`` (from 1) where it stands there more than once, ``module``
(``moe.layer``, or ``moe`` for all below) where several functions have that name, and ``tests`` of this mutant alone.
``function = ""`` is the module's own level, a class's name the class's own,
without the functions in it.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    raise SystemExit("mutate: error: the lists of mutants are TOML, which Python reads from 3.11 on") from None

LISTS = Path("tests/mutants")
PACKAGE = Path("mhmoe_fairseq")
_REQUIRED = {"change", "function", "expression", "becomes"}
_OPTIONAL = {"module", "occurrence", "tests", "needs"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class ListError(ValueError):
    """A list does not fit the package."""


@dataclass(frozen=True)
class Mutant:
    """One change of one expression; its other fields are the lists'.

    Attributes:
        list_name: the list it is from, ``moe`` for moe.toml.
        path: the file it changes, relative to the checkout.
        before, after: the whole file, unchanged and changed.
        changed: its function alone, or level of a class or file, unchanged and changed.
    """

    list_name: str
    path: Path
    before: str
    after: str
    changed: str
    change: str
    function: str
    expression: str
    becomes: str
    module: str
    tests: tuple[str, ...]
    needs: tuple[str, ...]

    def digest(self, root: Path, noticed_by: str) -> str:
        """Returns what differs once the function that it changes reads otherwise, or the test that noticed it.

        Of one that no test noticed, ``noticed_by`` empty, any file of its tests.
        """
        sources = [_test_source(root, test) for test in ([noticed_by] if noticed_by else self.tests)]
        return hashlib.sha256("\0".join([self.changed, *sources]).encode()).hexdigest()[:16]


def read_mutants(root: Path) -> list[Mutant]:
    """Returns the mutants of all lists, in the files' order.

    Raises:
        ListError: a line for every mutant that does not fit the package.
    """
    mutants: dict[str, Mutant] = {}
    problems = []
    for file in sorted((root / LISTS).glob("*.toml")):
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            problems.append(f"{LISTS / file.name}: {error}")
            continue
        of_list = {name: content[name] for name in ("tests", "needs") if name in content}
        for entry in content.get("mutant", []):
            try:
                if entry.get("change") in mutants:
                    raise ListError("another mutant has the same words")
                mutant = _read(root, file.stem, {"tests": [], **of_list, **entry})
                mutants[mutant.change] = mutant
            except ListError as error:
                problems.append(f"{LISTS / file.name}: {entry.get('change')!r}: {error}")
    if problems:
        raise ListError("\n".join(problems))
    return list(mutants.values())


def _read(root: Path, list_name: str, entry: dict) -> Mutant:
    missing, unknown = _REQUIRED - set(entry), set(entry) - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ListError(f"missing {sorted(missing)}, unknown {sorted(unknown)}")
    if not entry["tests"]:
        raise ListError("neither it nor the list names tests")
    for test in entry["tests"]:
        if not _test_source(root, test):
            raise ListError(f"there is no test {test}")
    path, after, changed = _changed(root, entry)
    fields = {"module": "", **entry, "tests": tuple(entry["tests"]), "needs": tuple(entry.get("needs", ()))}
    fields.pop("occurrence", None)
    return Mutant(list_name, path, _source(root / path), after, changed, **fields)


@functools.cache
def _test_source(root: Path, test: str) -> str:
    """What a test's function reads like, or the files of a file or folder; empty if there is none."""
    file, _, name = test.partition("::")
    path, function = root / file, name.replace("::", ".").partition("[")[0]
    if function:
        scope = _parsed(path).get(function) if path.exists() else None
        return "" if scope is None else ast.unparse(scope)
    files = sorted(path.rglob("*.py")) if path.is_dir() else filter(Path.exists, [path])
    return "\n".join(map(_source, files))


def _changed(root: Path, entry: dict) -> tuple[Path, str, str]:
    """Finds the expression that ``entry`` names; returns the file, its changed text, and what differs."""
    wanted, replacement = _parse(entry, "expression"), _parse(entry, "becomes")
    if len(wanted) != 1:
        raise ListError("'expression' must be one expression or one statement")
    is_expression = isinstance(wanted[0], ast.Expr) and len(replacement) == 1 and isinstance(replacement[0], ast.Expr)
    target, function = wanted[0].value if is_expression else wanted[0], entry["function"]
    module = entry.get("module", "")
    scopes = {path: _parsed(path).get(function) for path in _package(root, module)}
    counts = {path: len(_matches(scope, target)) for path, scope in scopes.items() if scope is not None}
    if not counts:
        raise ListError(f"no function {function!r} in {module or PACKAGE}")
    paths = [path for path, count in counts.items() if count]
    if not paths:
        raise ListError(f"{entry['expression']!r} is not in {function!r}")
    if len(paths) > 1:
        raise ListError(f"several modules have it: {', '.join(map(str, paths))}; name 'module'")
    count, occurrence = counts[paths[0]], entry.get("occurrence", 1)
    if "occurrence" not in entry and count > 1:
        raise ListError(f"the expression stands there {count} times; name 'occurrence'")
    if not 1 <= occurrence <= count:
        raise ListError(f"'occurrence' is {occurrence}; the expression stands there {count} times")
    tree = ast.parse(_source(paths[0]))
    scope = _scopes(tree)[function]
    found, unchanged = _matches(scope, target)[occurrence - 1], _own_text(scope)
    _Replace(found, replacement[0].value if is_expression else replacement).visit(tree)
    if _own_text(scope) == unchanged:
        raise ListError("'becomes' changes nothing")
    return paths[0].relative_to(root), ast.unparse(tree) + "\n", f"{unchanged}\n{_own_text(scope)}"


def _parse(entry: dict, field: str) -> list[ast.stmt]:
    try:
        return ast.parse(entry[field].strip()).body
    except SyntaxError as error:
        raise ListError(f"'{field}' is not Python: {error}") from None


@functools.cache
def _package(root: Path, module: str) -> list[Path]:
    """Returns the files of a module or of what lies below it."""
    below = (root / PACKAGE).joinpath(*filter(None, module.split(".")))
    return sorted(below.rglob("*.py")) or list(filter(Path.exists, [below.with_suffix(".py")]))


@functools.cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _parsed(path: Path) -> dict[str, ast.AST]:
    return _scopes(ast.parse(_source(path)))


def _scopes(node: ast.AST, name: str = "") -> dict[str, ast.AST]:
    """Returns all that a file defines, by qualified name; the file itself has the empty name."""
    found = {name: node} if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) else {}
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}".lstrip(".") if isinstance(child, (ast.ClassDef, *_FUNCTIONS)) else name
        found = {**_scopes(child, inner), **found}
    return found


def _own_text(scope: ast.AST) -> str:
    """What a function reads like, or a class or file without the functions and classes in it."""
    if isinstance(scope, _FUNCTIONS):
        return ast.unparse(scope)
    return "\n".join(ast.unparse(child) for child in scope.body if not isinstance(child, (ast.ClassDef, *_FUNCTIONS)))


def _matches(scope: ast.AST, target: ast.AST) -> list[ast.AST]:
    """Returns the nodes that read like ``target``, in the source's order; of a class or a file, its own level only."""
    text = ast.unparse(target)

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if type(child) is type(target) and ast.unparse(child) == text:
                yield child
            if isinstance(scope, _FUNCTIONS) or not isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
                yield from walk(child)

    return list(walk(scope))


class _Replace(ast.NodeTransformer):
    """Puts ``new`` in the position of one node."""

    def __init__(self, old: ast.AST, new: ast.AST | list[ast.stmt]) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        return self._new if node is self._old else self.generic_visit(node)

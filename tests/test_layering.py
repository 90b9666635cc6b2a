"""The shape of the code: imports go one way, files and functions stay small, only the command line prints."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mhmoe_fairseq"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

# The floors of the house, from the ground up: a part may import those on the lines before its own. Parts on one line
# do not know each other.
FLOORS = (
    ("common",),
    ("moe",),
    ("parallel",),
    ("data",),
    ("compat",),
    ("criterions", "metrics", "training", "torchscale_ext"),
    ("prepare", "models"),
    ("checkpoints",),
    ("tasks",),
    ("evaluation",),
    ("analysis",),
    ("experiments",),
    ("commands",),
)
MAY_IMPORT = {
    part: {below for floor in FLOORS[:height] for below in floor}
    for height, floor in enumerate(FLOORS)
    for part in floor
} | {"__init__": {"commands", "compat", "criterions", "models", "tasks", "training"}, "__main__": {"commands"}}
OF_THE_PACKAGE = ("__version__", "register")  # names that every part may import from it
FAIRSEQ = {"fairseq", "fairseq_cli", "hydra", "omegaconf", "torchscale", "fairscale", "timm"}
# Parts that stay free of other packages: the layer and expert parallelism can be lifted into other code.
FOREIGN = {
    "common": FAIRSEQ | {"torch"},
    "moe": FAIRSEQ | {"torch.distributed"},
    "parallel": FAIRSEQ,
    "torchscale_ext": {"fairseq_cli", "hydra"},
    "metrics": FAIRSEQ - {"fairseq"},
}


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def part_of(path: Path, package: Path = PACKAGE) -> str:
    """``moe`` for moe/layer.py, ``compat`` for compat.py."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(path: Path, root: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, inside functions too: ``a.b`` and ``a.b.name``."""
    package = ("mhmoe_fairseq", *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def test_every_part_of_the_package_has_a_place_in_the_layering() -> None:
    assert {part_of(path) for path in python_files(PACKAGE)} <= set(MAY_IMPORT)


def upward_imports(package: Path) -> list[str]:
    wrong = []
    for path in python_files(package):
        part = part_of(path, package)
        for module in imported_modules(path, package):
            names = module.split(".")
            if names[0] != "mhmoe_fairseq" or len(names) < 2 or names[1] in (part, *OF_THE_PACKAGE):
                continue
            if names[1] not in MAY_IMPORT[part]:
                wrong.append(f"{path.relative_to(package)} imports {module}: only {sorted(MAY_IMPORT[part])} lie below")
    return wrong


def foreign_imports(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package)} imports {module}"
        for path in python_files(package)
        for module in imported_modules(path, package)
        for foreign in FOREIGN.get(part_of(path, package), ())
        if is_within(module, foreign)
    ]


def test_imports_go_downwards_only() -> None:
    assert not upward_imports(PACKAGE), "\n".join(upward_imports(PACKAGE))


def test_low_layers_import_no_foreign_package() -> None:
    assert not foreign_imports(PACKAGE), "\n".join(foreign_imports(PACKAGE))


def test_an_upward_and_a_foreign_import_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "moe" / "layer.py"
    file.parent.mkdir()
    source = "from .config import x\nfrom ..models import options\ndef f():\n    from torch import distributed\n"
    file.write_text(source, encoding="utf-8")
    assert len(upward_imports(tmp_path)) == 2  # the module, and the name in it
    assert all("moe/layer.py imports mhmoe_fairseq.models" in line for line in upward_imports(tmp_path))
    assert foreign_imports(tmp_path) == ["moe/layer.py imports torch.distributed"]


def test_the_layer_imports_without_fairseq_and_torchscale() -> None:
    # None in sys.modules is Python's own way to say "not installed", for import and for find_spec.
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(FAIRSEQ)}))\n"
        "import torch\n"
        "from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer\n"
        "config = MHMoEConfig(embed_dim=16, num_heads=2, num_experts=4, top_k=2, expert_ffn_dim=8)\n"
        "print(tuple(MHMoELayer(config)(torch.ones(3, 16)).hidden.shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 16)"


def test_files_stay_small() -> None:
    files = python_files(PACKAGE, ROOT / "scripts", ROOT / "tests")
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in sizes.items() if lines > MAX_FILE_LINES]
    assert not long, long


def test_functions_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length_without_docstring(function)} lines"
        for path in python_files(PACKAGE, ROOT / "scripts", ROOT / "tests")
        for function in functions(path)
        if length_without_docstring(function) > MAX_FUNCTION_LINES
    ]
    assert not long, long


# Calls that write to the terminal, as they are written; and what only ``commands`` may import for it.
WRITES = {"print", "sys.stdout.write", "sys.stderr.write", "logging.basicConfig", "logging.StreamHandler"}
SAY = "mhmoe_fairseq.common.console.say"


def writers(package: Path) -> set[str]:
    """Files outside ``commands`` that write to the terminal; ``common/console.py`` is what commands write with."""
    found = set()
    for path in python_files(package):
        if part_of(path, package) == "commands" or path == package / "common" / "console.py":
            continue
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        if SAY in imported_modules(path, package) or any(ast.unparse(call.func) in WRITES for call in calls):
            found.add(str(path.relative_to(package)))
    return found


def test_only_commands_write_to_the_terminal() -> None:
    assert not writers(PACKAGE)


@pytest.mark.parametrize(
    "source", ["print(1)", "sys.stderr.write('x')", "from ..common.console import say", "logging.basicConfig()"]
)
def test_a_library_that_writes_is_seen(tmp_path: Path, source: str) -> None:
    for part in ("data", "commands"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "text.py").write_text(source, encoding="utf-8")
    assert writers(tmp_path) == {"data/text.py"}


def test_flags_are_read_in_one_place_only() -> None:
    """Below models/flags.py there is a config; nothing reads ``args.something``."""
    readers = [
        f"{path.relative_to(ROOT)}:{node.lineno} args.{node.attr}"
        for path in python_files(*(PACKAGE / part for part in ("moe", "parallel", "torchscale_ext")))
        if path != PACKAGE / "models" / "flags.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    ]
    assert not readers, readers


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and ends with an error at the second."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_contributings_tree_names_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0].splitlines()
    named = {line.split()[0].rstrip("/") for line in tree}
    packages = {part_of(path) + (".py" if path.parent == PACKAGE else "") for path in python_files(PACKAGE)}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    folders = {name.partition("/")[0] for name in listed if "/" in name and not name.startswith(".")}
    assert packages - {"__init__.py", "__main__.py"} | folders == named


def imported_at_once(path: Path, name: str, known: set[str]) -> set[str]:
    """Modules of ``known`` that a module imports before its functions run, those for type checkers among them."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {module}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found & known - {name}


def import_cycle(*folders: Path) -> list[str]:
    """The modules of a cycle, or of what leads to one; empty where there is none."""
    roots = {folder: folder.parent if (folder / "__init__.py").exists() else folder for folder in folders}
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for folder, root in roots.items()
        for path in python_files(folder)
    }
    imports = {name: imported_at_once(path, name, set(paths)) for name, path in paths.items()}
    while leaves := {name for name, imported in imports.items() if not imported & set(imports)}:
        imports = {name: imported for name, imported in imports.items() if name not in leaves}
    return sorted(imports)


def test_no_modules_import_each_other(tmp_path: Path) -> None:
    assert import_cycle(PACKAGE, ROOT / "scripts") == []
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").touch()
    (tmp_path / "p" / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b\n")
    (tmp_path / "p" / "b.py").write_text("from .a import x\n")
    (tmp_path / "p" / "c.py").write_text("def late():\n    from . import c\n")
    assert import_cycle(tmp_path / "p") == ["p.a", "p.b"]

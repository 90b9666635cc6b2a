"""The lists of mutants fit the package; the tool finds places, tells what the tests said and keeps it."""

import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
READS_TOML = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python from 3.11 on")
LIST = """
tests = ["tests/test_sum.py"]
[[mutant]]
change = "subtracts"
function = "Sum.of"
expression = "a+b"
becomes = "a - b"
"""


Mutate = Callable[..., subprocess.CompletedProcess]


def mutate_in(root: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "scripts/mutate.py"), *flags], capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of one module, one test and one list."""
    for name, text in {
        "mhmoe_fairseq/__init__.py": "",
        "mhmoe_fairseq/add.py": "LIMIT = 1\nclass Sum:\n    SIZE = 2\n    def of(self, a, b):\n"
        "        total = a + b  # the sum\n        if total > 100:\n            total = a + 0\n        return total\n"
        "class Other:\n    def of(self, a):\n        return a * (a * 3)\n",
        "tests/test_sum.py": "from mhmoe_fairseq.add import Sum\ndef test_sum():\n    assert Sum().of(2, 3) == 5\n",
        "tests/mutants/add.toml": LIST,
        "tests/support/mutants.py": (SCRIPTS.parent / "tests/support/mutants.py").read_text(),
        "scripts/mutate.py": re.sub(r"(?<=PRELOADED = )\[.*?\]", "[]", (SCRIPTS / "mutate.py").read_text()),
        "docs/mutants.md": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


@pytest.fixture
def mutate(project: Path) -> Mutate:
    return functools.partial(mutate_in, project)


@READS_TOML
def test_every_mutant_of_the_lists_is_found() -> None:
    done = mutate_in(SCRIPTS.parent, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="tomllib is there from Python 3.11 on")
def test_an_older_python_is_named() -> None:
    done = mutate_in(SCRIPTS.parent, "--check")
    assert done.returncode and done.stderr.strip().endswith("which Python reads from 3.11 on")


@READS_TOML
def test_outcomes_are_told_and_kept_and_the_checkout_stays_as_it_is(mutate: Mutate, project: Path) -> None:
    survivor = LIST.replace("subtracts", "the | limit").replace('"a+b"', '"total > 100"').replace('"a - b"', '"False"')
    broken = LIST.replace("subtracts", "no sum").replace('"Sum.of"', '""').replace('"a+b"', '"1"')
    broken = broken.replace('"a - b"', '"1 / 0"').partition("\n[[")[2] + 'module = "add"\n'
    parts = [LIST, survivor.partition("\n[[")[2], broken]
    (project / "tests/mutants/add.toml").write_text("\n[[".join(parts))
    before = (project / "mhmoe_fairseq/add.py").read_text()
    report = project / "docs/mutants.md"

    assert mutate("--most", "1").returncode == 0 and report.read_text().count("**not run**") == 2
    assert len(mutate("--only", "subtracts").stdout.splitlines()) == 1  # known
    done = mutate("--most", "2")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("3 mutants, 3 run: 1 noticed (33.3%), 1 survived, 1 broken")
    assert "| subtracts | `Sum.of` | `tests/test_sum.py::test_sum` |" in report.read_text()
    assert "**broken** `tests/test_sum.py`" in report.read_text() and "| the | limit |" not in report.read_text()
    assert (project / "mhmoe_fairseq/add.py").read_text() == before

    assert len(mutate().stdout.splitlines()) == 1  # nothing ran again
    elsewhere = before.replace("a * 3", "a * 4")
    (project / "mhmoe_fairseq/add.py").write_text(elsewhere)
    assert len(mutate("--only", "subtracts").stdout.splitlines()) == 1
    (project / "mhmoe_fairseq/add.py").write_text(elsewhere.replace("a + 0", "a + 1"))
    assert "killed by tests/test_sum.py::test_sum" in mutate("--only", "subtracts").stdout
    (project / "mhmoe_fairseq/add.py").write_text(before)
    test = project / "tests/test_sum.py"
    test.write_text(test.read_text() + "    assert Sum().of(50, 60) == 50\n")
    assert "killed by tests/test_sum.py::test_sum" in mutate("--only", "limit").stdout


@READS_TOML
def test_a_run_that_hangs_ends(mutate: Mutate, project: Path) -> None:
    hang = 'becomes = """import time\ntime.sleep(60)"""'
    text = LIST.replace('"a+b"', '"total = a + b"').replace('becomes = "a - b"', hang)
    (project / "tests/mutants/add.toml").write_text(text)
    assert "timed out (5 s): subtracts" in mutate("--time-limit", "5").stdout


@READS_TOML
def test_a_test_that_fails_without_a_mutant_is_named(mutate: Mutate, project: Path) -> None:
    (project / "tests/test_sum.py").write_text("def test_sum():\n    assert False\n")
    done = mutate()
    assert done.returncode == 2 and "without any mutant the tests killed: tests/test_sum.py::test_sum" in done.stderr


@READS_TOML
@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"a+b"', '"a + c"', "'a + c' is not in 'Sum.of'"),
        ('"a+b"', '"a +"', "'expression' is not Python"),
        ('"a - b"', '"b +"', "'becomes' is not Python"),
        ('"a - b"', '"a + b"', "'becomes' changes nothing"),
        ('"Sum.of"', '"Sum.add"', "no function 'Sum.add'"),
        ('"a+b"', '"a"', "stands there 2 times; name 'occurrence'"),
        ('"a+b"', '"a+b"\noccurrence = 2', "'occurrence' is 2; the expression stands there 1 times"),
        ('"a+b"', '"a+b"\nmodule = "elsewhere"', "no function 'Sum.of' in elsewhere"),
        ('"Sum.of"', '"Sum"', "'a+b' is not in 'Sum'"),
        ('"a - b"', '"a - b"\nwhy = "so"', "unknown ['why']"),
        ('change = "subtracts"', "", "missing ['change']"),
        ('"tests/test_sum.py"', '"tests/test_product.py"', "there is no test tests/test_product.py"),
        ('"tests/test_sum.py"', '"tests/test_sum.py::test_two"', "there is no test tests/test_sum.py::test_two"),
        ('tests = ["tests/test_sum.py"]', "", "neither it nor the list names tests"),
        ("[[mutant]]", LIST.partition("\n[[")[2].join(["[[", "[[mutant]]"]), "another mutant has the same words"),
        ("[[mutant]]", "[[mutant]", "add.toml: "),
    ],
)
def test_a_list_that_does_not_fit_is_refused(mutate: Mutate, project: Path, old: str, new: str, message: str) -> None:
    (project / "tests/mutants/add.toml").write_text(LIST.replace(old, new))
    done = mutate("--check")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@READS_TOML
def test_all_that_does_not_fit_is_named_at_once(mutate: Mutate, project: Path) -> None:
    second = LIST.partition("\n[[")[2].replace("subtracts", "adds").replace("a+b", "a + d")
    (project / "tests/mutants/add.toml").write_text(LIST.replace("a+b", "a + c") + f"[[{second}")
    error = mutate("--check").stderr
    assert "'subtracts': 'a + c' is not in" in error and "'adds': 'a + d' is not in" in error


@READS_TOML
def test_constants_of_a_class_and_of_a_module(project: Path) -> None:
    mutants = importlib.import_module("mutants")
    entries = [("", 'module = "add"\n', "1", "10"), ("Sum", "", "2", "20"), ("Other.of", "occurrence = 2\n", "a", "b")]
    changed = {"": "LIMIT = 10", "Sum": "SIZE = 20", "Other.of": "return a * (b * 3)"}
    for function, more, expression, becomes in entries:
        text = LIST.replace('"Sum.of"', f'"{function}"').replace('"a+b"', f'"{expression}"')
        (project / "tests/mutants/add.toml").write_text(text.replace('"a - b"', f'"{becomes}"') + more)
        [mutant] = mutants.read_mutants(project)
        assert changed[function] in mutant.after

"""The package as users reach it: ``--user-dir`` in every spelling, from a checkout and installed; the wheel."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mhmoe_fairseq
from mhmoe_fairseq.commands import main as cli

# Loads fairseq and its dependencies once, then each case in a child process of its own, as fairseq-train would:
# prints for each where the package came from and whether its task, criterion and architecture are known.
USER_DIR = """
import json, os, sys
from argparse import Namespace
import torch, torchscale.architecture.decoder
import fairseq, fairseq.tasks, fairseq.criterions, fairseq.models

def load(case):
    os.chdir(case["folder"])
    sys.path.insert(0, "")
    if case.get("imported"):
        import mhmoe_fairseq
        if case.get("unrepaired"):
            del mhmoe_fairseq.__path__[1:]
    for _ in range(2):  # fairseq imports the user directory for the parser and again in the trainer
        fairseq.utils.import_user_module(Namespace(user_dir=case["user_dir"]))
    package = sys.modules["mhmoe_fairseq"]
    known = "mhmoe_language_modeling" in fairseq.tasks.TASK_REGISTRY
    known &= "moe_cross_entropy" in fairseq.criterions.CRITERION_REGISTRY
    known &= "mhmoe_lm_tiny" in fairseq.models.ARCH_MODEL_REGISTRY
    return [os.path.dirname(os.path.realpath(package.__file__)), known]

sys.path[:] = [entry for entry in sys.path if entry != ""]
for case in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(load(case)), flush=True)
        except Exception as error:
            print(json.dumps([type(error).__name__, str(error)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def load_user_dirs(cases: list[dict], site: Path | None = None) -> list:
    """The outcome of each case; ``site`` is a folder of packages that comes first, as site-packages would."""
    command = [sys.executable, "-c", USER_DIR, json.dumps(cases)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(site)} if site else {})
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build from: building leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "mhmoe_fairseq", source / "mhmoe_fairseq", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(repository / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with the wheel's content next to the installed fairseq."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # A folder of links, not a link: fairseq looks for packages in its folder's parent.
    (folder / "fairseq").mkdir()
    for path in Path(metadata.distribution(fairseq_name()).locate_file("fairseq")).iterdir():
        (folder / "fairseq" / path.name).symlink_to(path)
    return folder


def fairseq_name() -> str:
    return "fairseq" if sys.version_info < (3, 11) else "fairseq-fixed"


def test_user_dir_of_a_checkout(repository: Path, tmp_path: Path) -> None:
    here, package = str(repository), str(repository / "mhmoe_fairseq")
    cases = [
        {"folder": here, "user_dir": "mhmoe_fairseq"},
        {"folder": here, "user_dir": "./mhmoe_fairseq/"},
        {"folder": str(repository / "tests"), "user_dir": "../mhmoe_fairseq"},
        {"folder": str(tmp_path), "user_dir": package},
        {"folder": here, "user_dir": "mhmoe_fairseq", "imported": True},
    ]
    assert load_user_dirs(cases) == [[package, True]] * len(cases)


def test_user_dir_of_the_installed_package(repository: Path, site: Path, tmp_path: Path) -> None:
    installed, elsewhere = str(site / "mhmoe_fairseq"), str(tmp_path)
    good = [
        {"folder": elsewhere, "user_dir": "mhmoe_fairseq"},
        {"folder": elsewhere, "user_dir": installed},
        {"folder": elsewhere, "user_dir": "mhmoe_fairseq", "imported": True},
        {"folder": elsewhere, "user_dir": installed, "imported": True},
    ]
    unrepaired = {"folder": elsewhere, "user_dir": "mhmoe_fairseq", "imported": True, "unrepaired": True}
    second_copy = {"folder": elsewhere, "user_dir": str(repository / "mhmoe_fairseq"), "imported": True}
    missing = {"folder": elsewhere, "user_dir": "no_such_package"}
    *outcomes, stock_error, copy_error, missing_error = load_user_dirs([*good, unrepaired, second_copy, missing], site)
    assert outcomes == [[installed, True]] * len(good)
    assert stock_error[0] == "ImportError"  # else compat.accept_installed_user_dir is needless
    assert copy_error[0] == "ImportError" and "not globally unique" in copy_error[1]
    assert missing_error[0] == "FileNotFoundError" and "no_such_package" in missing_error[1]


def test_the_command_prints_the_user_dir(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["user-dir"]) == 0
    assert capsys.readouterr().out == str(Path(mhmoe_fairseq.__file__).resolve().parent) + "\n"


def test_the_wheel_holds_the_whole_package_and_nothing_else(source: Path, wheel: Path) -> None:
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "mhmoe_fairseq").rglob("*")
        if path.suffix in {".py", ".yaml", ".json", ".typed", ".cpp", ".html"}
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {name.split("/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
        requirements = archive.read(information["METADATA"]).decode()
        commands = archive.read(information["entry_points.txt"]).decode()
    assert names == wanted
    assert "mhmoe = mhmoe_fairseq.commands.main:main" in commands
    assert 'Requires-Dist: fairseq==0.12.2; python_version < "3.11"' in requirements
    assert 'Requires-Dist: fairseq-fixed==0.12.3.1; python_version >= "3.11"' in requirements
    assert f"Version: {mhmoe_fairseq.__version__}\n" in requirements
    assert {"Requires-Python: >=3.10,<3.14", "Requires-Python: <3.14,>=3.10"} & set(requirements.splitlines())


def test_constraints_pin_one_matching_torch_everywhere(repository: Path) -> None:
    pins = {}
    for path in sorted((repository / "constraints").glob("py3*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        pins[path.stem] = dict(line.lower().split("==") for line in lines)
    assert sorted(pins) == ["py310", "py311", "py312", "py313"]
    common = {(pin["torch"], pin["torchvision"], pin["torchscale"]) for pin in pins.values()}
    assert common == {("2.14.1", "0.29.1", "0.3.0")}
    assert pins["py310"]["fairseq"] == "0.12.2"
    assert {pins[version]["fairseq-fixed"] for version in ("py311", "py312", "py313")} == {"0.12.3.1"}

"""`make setup` names what a machine lacks before it installs anything."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def check(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_machine", repository / "scripts" / "check_machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_compiler_is_named(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # nowhere a wheel: every version compiles
    assert any("no-such-compiler" in problem and "g++" in problem for problem in check.compiler_problems())


def test_an_unsupported_python_is_named(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SUPPORTED", ((3, 0),))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert any(problem.startswith(f"Python {version} is not supported") for problem in check.python_problems())


def test_disk_space_is_added_up_for_environment_and_downloads(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(check, "VENV_GIB", 2e6)
    monkeypatch.setattr(check, "DOWNLOAD_GIB", 1e6)
    [problem] = check.disk_problems(str(tmp_path / "not" / "yet" / "there"))
    assert str(tmp_path) in problem and "3000000 GiB are needed" in problem


def test_a_problem_ends_the_set_up_before_an_environment_is_made(repository: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    code = (
        "import runpy, shutil, sys; shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(1, 1, 0);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(repository / "scripts" / "check_machine.py"), str(tmp_path / "venv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "setup: error:" in done.stderr and "0.0 GiB free" in done.stderr


def test_find_python_prints_an_interpreter_that_runs(repository: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    find = repository / "scripts" / "find_python.sh"
    done = subprocess.run([str(find), version], capture_output=True, text=True)
    if done.returncode == 0:  # this test may run in an environment whose base interpreter is not on PATH
        found = subprocess.run([done.stdout.strip(), "--version"], capture_output=True, text=True)
        assert found.stdout.startswith(f"Python {version}.")
    assert subprocess.run([str(find), "2.0"], capture_output=True, text=True).returncode != 0

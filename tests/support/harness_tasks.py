"""Fixtures of the evaluation's tests."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

# Before anything imports lm-eval's data library: it must neither ask the network nor write into the home folder.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")

_QUESTIONS = (
    {"question": "The river follows", "choices": ["the captain near the old bridge", "qq zz"], "answer": 0},
    {"question": "The doctor", "choices": ["xx yy 77", "opens the garden before dawn"], "answer": 1},
    {"question": "Two lines.\nThe engine", "choices": ["mends the door", "a a a"], "answer": 1},
)
_KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
  - metric: chrf
""",
}


@pytest.fixture(scope="session")
def hub(trained_model):
    """The tiny trained model as fairseq's hub interface, on the CPU."""
    from mhmoe_fairseq.checkpoints.open import open_text_model

    return open_text_model(trained_model.folder, device="cpu")


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """A folder with tasks of every kind of request on a local file, each ``.yaml`` one task."""
    return write_tasks(tmp_path, _QUESTIONS)


def write_tasks(folder: Path, questions: Iterable[dict[str, Any]]) -> Path:
    """Write ``local_choice``, ``local_rolling`` and ``local_until`` about questions with choices; the folder."""
    rows = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (folder / "local.jsonl").write_text("".join(rows), encoding="utf-8")
    data = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "local.jsonl"}
  cache_dir: {folder / "cache"}
test_split: test
"""
    for kind, text in _KINDS.items():
        (folder / f"{kind}.yaml").write_text(f"task: local_{kind}{data}{text}", encoding="utf-8")
    return folder


def summary(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Of what lm-eval's ``simple_evaluate`` found: a task's scores, and the answers to the requests of each text."""
    scores = {name: value for name, value in results["results"][task].items() if name.endswith(",none")}
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return {"scores": scores, "answers": [sample["resps"] for sample in samples]}

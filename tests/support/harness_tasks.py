"""Fixtures of the evaluation's tests."""

import os
from pathlib import Path

import pytest

# Before anything imports lm-eval's data library: it must neither ask the network nor write into the home folder.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")


@pytest.fixture(scope="session")
def hub(trained_model):
    """The tiny trained model as fairseq's hub interface, on the CPU."""
    from mhmoe_fairseq.checkpoints.open import open_text_model

    return open_text_model(trained_model.folder, device="cpu")


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """A folder with tasks of every kind of request on a local file, each ``.yaml`` one task."""
    (tmp_path / "local.jsonl").write_text(
        '{"question": "The river follows", "choices": ["the captain near the old bridge", "qq zz"], "answer": 0}\n'
        '{"question": "The doctor", "choices": ["xx yy 77", "opens the garden before dawn"], "answer": 1}\n'
        '{"question": "Two lines.\\nThe engine", "choices": ["mends the door", "a a a"], "answer": 1}\n',
        encoding="utf-8",
    )
    data = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "local.jsonl"}
  cache_dir: {tmp_path / "cache"}
test_split: test
"""
    kinds = {
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
""",
    }
    for kind, text in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(f"task: local_{kind}{data}{text}", encoding="utf-8")
    return tmp_path

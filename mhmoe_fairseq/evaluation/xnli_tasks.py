"""Tasks of lm-eval on a local copy of XNLI.

Each includes the packaged ``xnli_<code>.yaml``, and with it the official prompts, targets and metrics, and changes
nothing but where the examples come from: the fields of the data set and of its splits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UserError
from ..common.files import atomic_open
from .lm_eval_support import require_lm_eval
from .xnli_files import XnliSet

# PyYAML reads a JSON string as YAML; the keys are those of lm-eval's task files.
_TASK = """\
include: {include}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    {split}: {data}
  cache_dir: {cache}
training_split: null
validation_split: {validation}
test_split: {test}
"""


def write_tasks(folder: Path, sets: Sequence[XnliSet], split: str) -> list[str]:
    """Write each language's examples, in the format that the packaged task reads, and its task.

    Files are ``xnli_<code>.jsonl`` and ``xnli_<code>.yaml``; ``mhmoe lm-eval --include_path FOLDER`` finds them.

    Returns:
        the tasks' names.

    Raises:
        UserError: lm-eval is not installed, or has no such task.
    """
    packaged = require_lm_eval() / "xnli"
    folder = folder.resolve()
    names = []
    for one in sets:
        name = f"xnli_{one.code}"
        include = packaged / f"{name}.yaml"
        if not include.is_file():
            raise UserError(f"{include}: lm-eval has no task {name}; another version of it may")
        data = folder / f"{name}.jsonl"
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in one.examples)
        _write(data, "".join(lines))
        text = _TASK.format(
            include=json.dumps(str(include)),
            split=split,
            data=json.dumps(str(data)),
            cache=json.dumps(str(folder / "cache")),
            validation="validation" if split == "validation" else "null",
            test="test" if split == "test" else "null",
        )
        _write(folder / f"{name}.yaml", text)
        names.append(name)
    return names


def _write(path: Path, text: str) -> None:
    with atomic_open(path) as stream:
        stream.write(text.encode())

"""How fast vLLM serves language models: exported, and timed by turns in a process of vLLM's own environment."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.huggingface.export import export_model
from ..checkpoints.open import Opened
from ..common.errors import UserError
from .records import Record
from .speed import Workload, one_dictionary, speed_record

PROGRAM = Path(__file__).with_name("vllm_turns.py")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_RATES = ("output tokens/s", "input tokens/s")
_SHOWN = 400  # characters of what went wrong there


def measure_served(
    models: Sequence[Opened], workloads: Sequence[Workload], python: Path, rounds: int = 7
) -> list[list[Record]]:
    """Times workloads on every model in vLLM, by turns.

    Args:
        models: of language models with one dictionary; vLLM computes in the first one's precision.
        python: interpreter of an environment with vLLM.
        rounds: that are timed, after one that is not.

    Returns:
        for each workload and model a record whose split is ``vllm-`` and the workload.

    Raises:
        UserError: for a model that cannot be exported, of another dictionary, or with too few positions; where vLLM
            fails, with its last line.
    """
    dictionary = one_dictionary(models, workloads)
    asked = [{"prompts": load.prompts(dictionary).tolist(), "new": load.new} for load in workloads]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(len(models))]
        for opened, folder in zip(models, folders):
            export_model(opened.file, folder, data=opened.data)
        request, result = Path(scratch, "request.json"), Path(scratch, "result.json")
        dtype = _DTYPES[models[0].precision]
        given = {"folders": list(map(str, folders)), "workloads": asked, "dtype": dtype, "rounds": rounds}
        request.write_text(json.dumps(given))
        command = [os.path.abspath(python), str(PROGRAM), str(request), str(result)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "it ended without a word").splitlines()
            raise UserError(f"--vllm ({python}) failed: {lines[-1][:_SHOWN]}")
        found = json.loads(result.read_text())
    engine = f"vLLM {found['version']}, {dtype}"
    return [
        [
            speed_record(opened, load, {name: [load.tokens(name) / each for each in rounds] for name in _RATES},
                len(models), engine)
            for opened, rounds in zip(models, of_load)
        ]
        for load, of_load in zip(workloads, found["seconds"])
    ]  # fmt: skip

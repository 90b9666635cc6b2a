"""lm-eval on an exported folder, by someone without this package: ``python lm_eval_probe.py FOLDER TASKS OUT.json``.

What is written: scores and answers of each task; ``rolling with defaults`` is ``local_rolling`` without
``add_bos_token=False``.
"""

import json
import sys

for _name in ("mhmoe_fairseq", "fairseq", "torchscale", "fairscale", "sentencepiece"):
    sys.modules[_name] = None  # type: ignore[assignment]

from harness_tasks import summary  # noqa: E402, I001 (before lm-eval: it sets what lm-eval reads)
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def main(folder: str, tasks: str, out: str) -> None:
    manager = TaskManager(include_path=tasks, include_defaults=False)

    def run(*names: str, **more: bool) -> dict[str, dict]:
        arguments = {"pretrained": folder, "trust_remote_code": True, **more}
        settings = {"task_manager": manager, "batch_size": 4, "device": "cpu", "bootstrap_iters": 0}
        results = simple_evaluate("hf", arguments, tasks=[*names], **settings)
        return {name: summary(results, name) for name in names}

    found = {"rolling with defaults": run("local_rolling")["local_rolling"]}
    found |= run("local_choice", "local_until") | run("local_rolling", add_bos_token=False)
    with open(out, "w", encoding="utf-8") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])

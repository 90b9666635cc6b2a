"""Made-up questions of every task of ``mhmoe zero-shot english``, and the package and the copy that they come from."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

from mhmoe_fairseq.common.files import json_line, write_json
from mhmoe_fairseq.data.zero_shot_tasks import TASKS
from mhmoe_fairseq.prepare.workspace import describe_files

WORDS = ["river", "garden", "captain", "bridge"]


def choice(index: int, size: int = 4) -> dict[str, Any]:
    labels = list("ABCD"[:size])
    return {"choices": {"text": WORDS[:size], "label": labels}, "answerKey": labels[index]}


TRUTH = {
    "question": "Who?", "mc1_targets": {"choices": WORDS, "labels": [1, 0, 0, 0]},
    "mc2_targets": {"choices": WORDS[:3], "labels": [1, 1, 0]},
}  # fmt: skip
# The right answers' indices: 0, 1, 0, ... of two, 0, 2, 1, ... of more.
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [{"question": f"Which {n}?", **choice(n, 3 + n % 2)} for n in (0, 2, 1)],
    "arc_challenge": [{"question": f"What {n}?", **choice(n)} for n in (0, 2, 2)],
    "openbookqa": [{"question_stem": f"The {WORDS[n]} is", **choice(n)} for n in (1, 2, 1)],
    "rte": [{"sentence1": f"A {n}.", "sentence2": "The garden.", "label": n} for n in (0, 1, 0)],
    "boolq": [{"passage": "The river. " * 60, "question": "is it", "label": n} for n in (1, 1, 0)],
    "piqa": [{"goal": f"Mend {n}", "sol1": "the door", "sol2": "the bridge", "label": n} for n in (1, 0, 1)],
    "winogrande": [
        {"sentence": "The captain saw the doctor, _ waits.", "option1": "captain", "option2": "doctor", "answer": of}
        for of in "122"
    ],
    "hellaswag": [
        {"activity_label": "River", "ctx_a": "A man is here.", "ctx_b": "he", "endings": WORDS, "label": of}
        for of in "032"
    ],
    "truthfulqa": [TRUTH, TRUTH],
}  # fmt: skip
FIRST_IS_RIGHT = {
    "arc_easy": 1, "arc_challenge": 1, "openbookqa": 0, "rte": 2, "boolq": 1, "piqa": 1, "winogrande": 1,
    "hellaswag": 1,
}  # fmt: skip


def write_tasks_folder(folder: Path, *, truthfulqa: bool = False) -> Path:
    """A folder as ``mhmoe prepare zero-shot`` makes it, with three questions a task."""
    folder.mkdir(parents=True)
    names = [name for name, task in TASKS.items() if truthfulqa or task.majority is not None]
    files = sorted({TASKS[name].file for name in names})
    for file in files:
        (folder / file).write_bytes(b"".join(map(json_line, QUESTIONS[file.removesuffix(".jsonl")])))
    kept = {"kind": "zero-shot", "tasks": dict.fromkeys(names, {}), "files": describe_files(folder, files)}
    write_json(folder / "manifest.json", kept)
    return folder


def write_package(path: Path, members: dict[str, str], requests: str) -> None:
    """The package with these questions: ``members`` are the Arrow files' names by task."""
    import pyarrow

    with zipfile.ZipFile(path, "w") as archive:
        for name, member in members.items():
            rows = [
                {**{key: row[key] for key in row if key != "label"}, "answer": bool(row["label"])}
                if name == "boolq"
                else row
                for row in QUESTIONS[name]
            ]
            table, stream = pyarrow.Table.from_pylist(rows), io.BytesIO()
            with pyarrow.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
            archive.writestr(member, stream.getvalue())
        for name in ("arc_easy", "arc_challenge", "openbookqa"):
            lines = [json.dumps(request) for request in _requests(name)]
            archive.writestr(requests.format(name), gzip.compress("\n".join(lines).encode()))


def _requests(name: str) -> list[dict[str, Any]]:
    """Two requests for each question, the last question first, behind an example of a few-shot prompt."""
    found = [{"doc_id": 1_000_000, "doc": {"id": "x", "query": "Question: no\nAnswer:", "choices": WORDS, "gold": 0}}]
    for number, row in reversed(list(enumerate(QUESTIONS[name]))):
        text, question = row["choices"]["text"], row.get("question", row.get("question_stem"))
        gold = row["choices"]["label"].index(row["answerKey"])
        doc = {"id": str(number), "query": f"Question: {question}\nAnswer:", "choices": text, "gold": gold}
        found += 2 * [{"doc_id": number, "doc": doc}]
    return found

"""``--mhmoe-load-log``: what a training writes and shows, on ranks, over a resume, and in TensorBoard."""

import csv
import json
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from parallel_runs import BATCH_LINES, LINE_WORDS, train, write_even_corpus
from tensorboardX.proto.event_pb2 import Event
from workers import Workers

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.training.load_log import _summary_writer, check_load_log

CHOICES = 4 * BATCH_LINES * (LINE_WORDS + 1) * 2  # of one head in an update of four batches: tokens, top-2
FLAGS = ("--log-interval", 2, "--checkpoint-activations")
LAYER, HEADS, EXPERTS = 1, 2, 8  # of two layers the second has experts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=32)


def events(folder: Path) -> list[Event]:
    """The events of a folder's files: records of length, checksum, bytes, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        rest = path.read_bytes()
        while rest:
            size = int.from_bytes(rest[:8], "little")
            found.append(Event.FromString(rest[12 : 12 + size]))
            rest = rest[16 + size :]
    return found


def test_a_resumed_training_goes_on_with_the_file(data: Path, tmp_path: Path) -> None:
    file, drawn = tmp_path / "new" / "loads.jsonl", tmp_path / "tensorboard"
    flags = (*FLAGS, "--mhmoe-load-log", file, "--tensorboard-logdir", drawn)
    shown = train(1, data, tmp_path / "run", *flags, updates=5)
    with open(file, "ab") as stream:  # as from a training that was killed two updates after it had saved
        stream.write(file.read_bytes().splitlines()[-1].replace(b'"update": 4', b'"update": 6') + b'\n{"update')
    train(1, data, tmp_path / "run", *flags, updates=8)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["update"], row["updates"], row["layer"]) for row in rows] == [(n, 2, LAYER) for n in (2, 4, 6, 8)]
    assert all(len(row["load"]) == HEADS and len(row["load"][0]) == EXPERTS for row in rows)
    assert all(sum(counts) == 2 * CHOICES for row in rows for counts in row["load"])
    load = [sum(counts) for counts in zip(*rows[0]["load"])]
    spread = [float(shown[0][f"layer_load_{name}"]) for name in ("min", "p50", "p90", "max")]
    assert spread == pytest.approx([max(load) * EXPERTS / sum(load)] * 4, abs=1e-3)
    histograms = {
        (value.tag, event.step): list(value.histo.bucket)
        for event in events(drawn / "loads") for value in event.summary.value
    }  # fmt: skip
    assert histograms["load/layer_1", 2] == load and histograms["load/layer_1/head_1", 6] == rows[2]["load"][1]


def draw_within_one_second(folder: str) -> None:
    with mock.patch("time.time", return_value=1e9):
        writer = _summary_writer(folder)
    writer.add_scalar("loads", 1.0)
    writer.close()


def test_trainings_of_one_second_draw_into_files_of_their_own(tmp_path: Path) -> None:
    Workers(2).run(draw_within_one_second, str(tmp_path), group=False)
    assert [event.summary.value[0].tag for event in events(tmp_path / "loads") if event.summary.value] == ["loads"] * 2


def test_ranks_write_one_file_of_their_sums(data: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.csv"
        train(ranks, data, tmp_path / f"run-{ranks}", "--log-interval", 1, "--mhmoe-load-log", file, updates=2)
        with open(file, newline="") as stream:
            found.append(list(csv.DictReader(stream)))
    first = [[row for row in rows if row["update"] == "1"] for rows in found]
    assert first[0] == first[1] and len(found[1]) == 2 * HEADS * EXPERTS  # before the first update all are the same
    total = Counter()
    for row in found[1]:
        total[row["update"], row["layer"], row["pool"], row["head"]] += int(row["load"])
    assert total == {(str(n), "1", "", str(head)): CHOICES for n in (1, 2) for head in (0, 1)}


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("loads.txt", None, "must end in .jsonl or .csv"),
        ("folder.csv", "", "must be a file to write, not a folder"),
        ("other.csv", b"a,b\n1,2\n", "holds something else"),
        ("other.jsonl", b'{"loss": 1}\n', "holds something else"),
    ],
)
def test_where_no_loads_can_go_is_refused(tmp_path: Path, name: str, content: bytes | str | None, rule: str) -> None:
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rule) as error:
        check_load_log(str(path))
    assert str(error.value).startswith(f"--mhmoe-load-log ({path})")

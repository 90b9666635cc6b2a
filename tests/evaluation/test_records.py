"""Records: what is written is read again; what is no record is refused by field and rule."""

import dataclasses
import json
import sys

import pytest

from mhmoe_fairseq.evaluation.records import (
    SCHEMA,
    ExpertLoads,
    LayerLoads,
    Metric,
    Record,
    describe_origin,
    looks_at_test,
    mean_percent,
    read_record,
    record_file,
    write_record,
)

RECORD = Record(
    what="perplexity",
    split="test",
    metrics={"perplexity": Metric(12.5, "perplexity", count=100), "loss": Metric(3.64, "bits/token", 0.01, 100)},
    parts={"de": {"perplexity": Metric(11.0, "perplexity")}, "en": {"accuracy": Metric(50, "%", baselines={"b": 40})}},
    experts=ExpertLoads([LayerLoads(1, [3.0, 1.0, 0.0, 0.0], dropped=1.0), LayerLoads(1, [3.0, 0, 0, 0], part="de")]),
    absent={"METEOR": "no java"},
    data={"digest": "ab"},
)


def test_a_record_survives_its_file(tmp_path):
    path = record_file(tmp_path / "run", "test")
    write_record(path, RECORD)
    assert path.name == "record-test.json"
    assert read_record(path) == RECORD
    assert json.loads(path.read_text())["schema"] == SCHEMA


def test_of_a_test_split_alone_earlier_records_are_told(tmp_path):
    path = tmp_path / "record.json"
    assert looks_at_test(path, RECORD) == []
    write_record(path, dataclasses.replace(RECORD, provenance={"date": "2", "earlier": ["1"]}))
    assert looks_at_test(path, RECORD) == ["1", "2"]
    assert looks_at_test(path, dataclasses.replace(RECORD, what="masked")) == []
    write_record(path, dataclasses.replace(RECORD, split="valid"))
    assert looks_at_test(path, dataclasses.replace(RECORD, split="valid")) == []
    path.write_text("{")
    assert looks_at_test(path, RECORD) == []


def test_parts_and_the_main_metric():
    assert RECORD.main.value == 12.5
    assert RECORD.values("perplexity") == {"de": 11.0}


def test_a_mean_has_its_standard_error_in_percent():
    metric = mean_percent([True] * 50 + [False] * 50, {"chance": 25.0})
    assert metric == Metric(50.0, "%", 5.0, 100, {"chance": 25.0})
    assert mean_percent([0.2, 0.4]).value == pytest.approx(30.0)


def test_expert_loads_follow_the_layer_s_definitions():
    whole = RECORD.experts.of()
    assert RECORD.experts.parts == ["de"]
    assert [row.name for row in whole.layers] == ["2"]
    assert whole.active() == [0.5]
    assert whole.max_over_mean() == [3.0]
    assert whole.effective() == pytest.approx([27**-0.25])  # of shares 3/4 and 1/4
    assert RECORD.experts.of("de").effective() == [0.25]
    assert whole.layers[0].overflow == 0.25
    assert LayerLoads(2, [1.0], pool="image").name == "3 image"
    assert LayerLoads(0, [6.0, 2.0], dropped=2.0).overflow == 0.25  # of the assignments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "mhmoe-record/0"}, r"schema \(mhmoe-record/0\) must be mhmoe-record/1"),
        ({"what": "taste"}, r"what \(taste\) must be one of perplexity, "),
        ({"metrics": {}}, "metrics must hold at least one"),
        ({"metrics": {"loss": {"value": "3", "unit": "bits"}}}, r"metric loss: value \('3'\) must be a number"),
        ({"metrics": {"loss": {"value": 3}}}, "unit"),
        ({"parts": None}, "malformed"),
        ({"data": []}, "data must be an object"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, change, message):
    path = tmp_path / "record-test.json"
    write_record(path, RECORD)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"record-test.json: .*{message}"):
        read_record(path)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_another_json_file_is_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"schema \(None\) must be"):
        read_record(path)


def test_a_missing_record_says_what_writes_it(tmp_path):
    with pytest.raises(ValueError, match="does not exist: mhmoe evaluate writes it"):
        read_record(tmp_path / "record-test.json")


def test_origin_tells_versions_and_command():
    origin = describe_origin("cpu", "float32")
    assert origin["versions"]["python"] == sys.version.split()[0]
    assert "torch" in origin["versions"]
    assert (origin["device"], origin["precision"]) == ("cpu", "float32")

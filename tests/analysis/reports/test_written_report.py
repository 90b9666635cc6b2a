"""Reports of runs whose records hold metrics chosen by hand."""

import dataclasses
import re
from pathlib import Path

import pytest
from written_runs import loads, make_record, text_metrics, write_run

from mhmoe_fairseq.analysis.reports.plots import draw_all
from mhmoe_fairseq.analysis.reports.report import compose, write_report
from mhmoe_fairseq.analysis.reports.runs import BEFORE, find_runs, read_model
from mhmoe_fairseq.analysis.reports.tables import PaperTable
from mhmoe_fairseq.common.files import write_json
from mhmoe_fairseq.evaluation.records import Metric, record_file, write_record

PNG = b"\x89PNG"


def report(paths: Path | list[Path], out: Path, **how: object) -> str:
    return write_report(find_runs(paths if isinstance(paths, list) else [paths]), out, **how)


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of every Markdown table as column -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def row_of(text: str, name: str, table: int = 0) -> dict[str, str]:
    (row,) = [row for row in tables(text)[table] if next(iter(row.values())) == name]
    return row


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A dense model and one with experts, evaluated on both splits."""
    experts = loads((1, None, [100.0, 100, 0, 0]), (3, None, [397.0, 1, 1, 1]))
    for split, value in (("valid", 21.0), ("test", 20.0)):
        record = make_record(text_metrics(value, bits_per_byte=1.25), split=split)
        write_run(tmp_path / "runs" / "dense", record, command="fairseq-train DATA \\\n    --arch dense_lm_tiny")
        record = make_record(text_metrics(value / 2, bits_per_byte=1.0), split=split, model="mhmoe", experts=experts)
        write_run(tmp_path / "runs" / "mhmoe", record)
    return tmp_path / "runs"


def test_a_row_has_sizes_costs_metrics_and_use_of_experts(runs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    text = report(runs, tmp_path / "out" / "report.md", say=said.append)
    assert row_of(text, "dense") == {
        "model": "dense", "heads": "–", "experts x width": "–", "top-k": "–", "parameters": "2.00M",
        "active": "2.00M", "MFLOPs/token": "4.10", "tokens/s": "800", "updates": "8", "valid ppl": "21.00",
        "test ppl": "20.00", "test bits/byte": "1.2500", "active experts": "–", "effective experts": "–",
        "MaxVio": "–",
    }  # fmt: skip
    row = row_of(text, "mhmoe")
    assert [row[of] for of in ("heads", "experts x width", "top-k", "test ppl")] == ["2", "4 x 1,024", "2", "10.00"]
    assert row["active experts"] == "75.0 %"  # half of the first layer's, all of the second's
    assert row["MaxVio"] == "1.99"  # twice the mean load in the first layer, 3.97 times in the second
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(plots) == {f"report-plots/{name}.png" for name in ("valid-ppl", "gate-loss", "expert-activation")}
    assert all((tmp_path / "out" / plot).read_bytes().startswith(PNG) for plot in plots)
    assert "sentences, SHA-256 `000" in text and "commit c0ffee" in text
    assert "# dense, dense\nfairseq-train DATA \\\n    --arch dense_lm_tiny\n```" in text
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == f"{text}\n"
    assert "tokens/s" in said[0] and said[1] == f"report: {tmp_path / 'out' / 'report.md'}"


def test_a_mixture_of_domains_has_its_columns_and_its_costs(runs: Path, tmp_path: Path) -> None:
    how = {"domain mixture": "exact", "domain prior": "uniform", "passes over the text": 11}
    mixed = make_record(text_metrics(25.0), "domain mixture", split="test", settings=how)
    path = record_file(write_run(tmp_path / "demix", make_record(text_metrics(19.0))), "test-exact")
    write_record(path, mixed)
    text = report([runs, tmp_path / "demix"], tmp_path / "report.md", plots=False)
    of_mixed, of_dense = (row_of(text, name) for name in ("demix", "dense"))
    shown = ("test ppl", "test ppl by domain mixture", "passes by mixture")
    assert [of_mixed[title] for title in shown] == ["19.00", "25.00", "11"]
    assert [of_dense[title] for title in shown] == ["20.00", "–", "–"]


def test_choices_are_told_where_they_are_not_top_k(runs: Path, tmp_path: Path) -> None:
    for choices, told in (("2.0", None), ("3.5", "3.50")):
        log = runs / "mhmoe" / "train.log"
        log.write_text(log.read_text().replace('"gate_loss": "1.1"', f'"gate_loss": "1.1", "moe_choices": "{choices}"'))
        text = report(runs, tmp_path / "report.md", plots=False)
        assert [row_of(text, name).get("top-k in training") for name in ("mhmoe", "dense")] == [told, told and "–"]
        log.write_text(log.read_text().replace(f', "moe_choices": "{choices}"', ""))


def test_updates_of_parts_count_and_are_told(runs: Path, tmp_path: Path) -> None:
    mixed = write_run(tmp_path / "btx" / "seed-1", make_record(text_metrics(20.0)), updates=4)
    write_json(mixed / BEFORE, {"seed": 3, "law": 1})
    text = report([runs, tmp_path / "btx"], tmp_path / "report.md", plots=False)
    assert {row["model"]: row["updates"] for row in tables(text)[0]}.items() >= {"dense": "8", "btx": "8"}.items()
    assert "- updates of btx: 3 seed, 1 law, 4 of what was made of these, whose speed" in text
    assert "updates of dense" not in text and "updates done" not in text
    [run], [dense] = (read_model("of", [folder]).runs for folder in (mixed, runs / "dense"))
    assert run.curve("valid_ppl")[-1][0] == dense.curve("valid_ppl")[-1][0] == 8  # the curves end together


def test_memory_has_a_column_and_a_note_where_a_log_tells_it(runs: Path, tmp_path: Path) -> None:
    assert "peak GB" not in report(runs, tmp_path / "report.md")
    with open(runs / "mhmoe" / "train.log", "a", encoding="utf-8") as log:
        log.write('{"num_updates": "9", "peak_gb": "1.234"}\n')
    text = report(runs, tmp_path / "report.md")
    assert [row_of(text, name)["peak GB"] for name in ("dense", "mhmoe")] == ["–", "1.23"]
    assert "- peak GB: most memory of a training" in text


def test_what_was_not_measured_is_a_dash(runs: Path, tmp_path: Path) -> None:
    (runs / "dense" / "record-test.json").unlink()
    (runs / "mhmoe" / "train.log").unlink()
    text = report(runs, tmp_path / "report.md", plots=False)
    assert row_of(text, "dense")["test ppl"] == "–" and row_of(text, "dense")["valid ppl"] == "21.00"
    assert row_of(text, "mhmoe")["updates"] == "–"


def test_settings_that_differ_are_listed(runs: Path, tmp_path: Path) -> None:
    assert "All models share data order" in report(runs, tmp_path / "report.md", plots=False)
    record = make_record(text_metrics(20.0))
    record.model["settings"]["optimization"]["lr"] = [0.5]
    write_run(runs / "dense", record, updates=10)
    text = report(runs, tmp_path / "report.md", plots=False)
    assert row_of(text, "--lr", table=1) == {"setting": "--lr", "dense": "0.5", "mhmoe": "0.002"}
    assert row_of(text, "updates done", table=1)["dense"] == "10"


@pytest.mark.parametrize(
    "trained, command, told",
    [
        ({}, "fairseq-train", []),
        ({"dense": None, "mhmoe": "bf16"}, "fairseq-train --mhmoe-precision bf16", ["dense fp32, mhmoe bf16."]),
        (
            {"dense": "bf16"},
            "fairseq-train --mhmoe-precision auto",
            ["all models bf16, as --mhmoe-precision auto chose"],
        ),
    ],
)
def test_a_report_says_what_was_computed_in(tmp_path: Path, trained: dict, command: str, told: list[str]) -> None:
    for name in ("dense", "mhmoe"):
        record = make_record(text_metrics(20.0))
        record.model["settings"] |= {"model": {"mhmoe_precision": trained[name]}} if name in trained else {}
        write_run(tmp_path / name, record, command=command)
    text = report(tmp_path, tmp_path / "report.md", plots=False)
    lines = [line.removeprefix("- trained in: ") for line in text.splitlines() if line.startswith("- trained in: ")]
    assert [line[: len(expected)] for line, expected in zip(lines, told)] == told and len(lines) == len(told)


@pytest.mark.parametrize(
    "devices, told",
    [
        ({}, []),
        ({"dense": "cpu", "mhmoe": "cpu"}, []),
        ({"dense": "cpu", "mhmoe": "cuda:1"}, ["- evaluated on: dense cpu, mhmoe cuda."]),
        ({"dense": "cuda:0", "mhmoe": "cuda:1"}, ["- evaluated on: all models cuda."]),
    ],
)
def test_a_report_says_which_models_a_gpu_evaluated(tmp_path: Path, devices: dict, told: list[str]) -> None:
    for name in ("dense", "mhmoe"):
        record = make_record(text_metrics(20.0))
        record.provenance.pop("device", None)
        record.provenance.update({"device": devices[name]} if name in devices else {})
        write_run(tmp_path / name, record)
    text = report(tmp_path, tmp_path / "report.md", plots=False)
    assert [line for line in text.splitlines() if line.startswith("- evaluated on: ")] == told


def seeds(folder: Path, model: str, metrics: dict[int, dict[str, Metric]], **fields: object) -> None:
    for seed, measured in metrics.items():
        write_run(folder / model / f"seed-{seed}", make_record(measured, model=model, **fields))


def test_seeds_give_mean_sample_deviation_and_changes_against_the_same_seed(tmp_path: Path) -> None:
    seeds(tmp_path, "dense", {n: text_metrics(value) for n, value in ((1, 20.0), (2, 10.0), (4, 40.0))})
    seeds(tmp_path, "mhmoe", {n: text_metrics(value) for n, value in ((10, 1.0), (2, 11.0), (1, 16.0))})
    text = report(tmp_path, tmp_path / "report.md", reference="dense")
    dense, mhmoe = row_of(text, "dense"), row_of(text, "mhmoe")
    assert (dense["seeds"], dense["test ppl"]) == ("3", "23.33 ± 15.28")
    assert mhmoe["test ppl"] == "9.33 ± 7.64"
    assert (mhmoe["test ppl against dense"], dense["test ppl against dense"]) == ("-5.0 % ± 21.2", "–")
    assert "Mean ± sample standard deviation" in text and (tmp_path / "report-plots/seeds-test-ppl.png").is_file()
    with pytest.raises(ValueError, match=r"--reference \(xmoe\) must be one of dense, mhmoe"):
        report(tmp_path, tmp_path / "report.md", reference="xmoe")


def test_parts_have_a_table_and_bars(tmp_path: Path) -> None:
    for model, factor in (("dense", 1.0), ("mhmoe", 0.5)):
        measured = {
            seed: {"perplexity": Metric(8.0 * factor * seed, "perplexity", count=60)} for seed in (1, 2)
        }  # fmt: skip
        parts = {
            name: {
                "loss": Metric(3.0, "bits/token"),
                "perplexity": Metric(factor * value, "perplexity", count=30),
                "bits/character": Metric(factor, "bits/character"),
            }
            for name, value in (("de", 4.0), ("zh", 16.0))
        }
        seeds(tmp_path, model, measured, parts=parts, experts=_language_loads() if model == "mhmoe" else None)
    text = report(tmp_path, tmp_path / "report.md")
    assert row_of(text, "zh", table=1) == {
        "": "zh", "tokens": "30", "dense, ppl": "16.00 ± 0.00", "mhmoe, ppl": "8.00 ± 0.00",
        "dense, bits/char": "1.0000 ± 0.0000", "mhmoe, bits/char": "0.5000 ± 0.0000",
    }  # fmt: skip
    assert row_of(text, "all", table=1)["dense, ppl"] == "12.00 ± 5.66"
    assert row_of(text, "mhmoe", table=2) == {
        "model": "mhmoe", "load in common": "25.0 %", "part guessed right": "–",
    }  # fmt: skip
    plots = {path.name for path in (tmp_path / "report-plots").iterdir()}
    assert plots >= {"perplexity-perplexity-test.png", "perplexity-bits-per-character-test.png", "seeds-test-ppl.png",
                     "routing-mhmoe-load.png"}  # fmt: skip


def _language_loads():
    return loads((1, None, [10.0, 6.0]), (1, "de", [8.0, 0.0]), (1, "zh", [2.0, 6.0]))


def test_routing_that_was_analysed_tells_languages_apart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mhmoe", make_record(text_metrics(20.0), experts=_language_loads()))
    measured = make_record(
        {"loss": Metric(4.0, "bits/token", count=60), "part guessed right": Metric(80.0, "%")}, "routing",
        experts=_language_loads(), settings={"guesses": [[[3, 1], [1, 3]]] * 2, "piece_tokens": 16},
    )  # fmt: skip
    (run / "routing-test.json").write_text((run / "record-test.json").read_text())
    write_record(run / "routing-test.json", measured)
    text = report(run, tmp_path / "report.md")
    assert row_of(text, "mhmoe", table=1)["part guessed right"] == "80.0 %"
    assert "chance is 50.0 %" in text and (tmp_path / "report-plots" / "routing-mhmoe-overlap.png").is_file()


def test_masked_positions_stand_beside_a_guess_without_context(tmp_path: Path) -> None:
    def metrics(perplexity: float, guessed: float) -> dict[str, Metric]:
        return {
            "perplexity": Metric(perplexity, "perplexity", count=90, baselines={"without context": guessed}),
            "accuracy": Metric(30.0, "%", count=90, baselines={"without context": 10.0}),
        }

    parts = {"image": metrics(50.0, 60.0), "pair_text": metrics(9.0, 8.0)}
    write_run(tmp_path / "mhmoe", make_record(metrics(30.0, 40.0), "masked", "mhmoe", parts=parts))
    text = report(tmp_path, tmp_path / "report.md", plots=False)
    assert row_of(text, "words of pairs", table=1) == {
        "": "words of pairs", "positions": "90", "mhmoe, ppl": "9.00", "without context, ppl": "8.00",
        "mhmoe, right": "30.00", "without context, right": "10.00",
    }  # fmt: skip
    assert row_of(text, "all", table=1)["without context, ppl"] == "40.00"
    assert row_of(text, "*without context*")["test ppl"] == "40.00"
    assert "the same masks for every model" in text and "Above the best way" not in text


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Models fine-tuned on questions and captions; the second was captioned without training captions."""
    for name, score in (("dense", 41.25), ("mhmoe", 43.5), ("params", 37.5), ("flops", 40.0)):
        answers = {"accuracy": Metric(score, "%", count=1210, baselines={"question only": 37.5, "most frequent": 20.0})}
        if name == "mhmoe":  # its own standard error, larger than the guess's
            answers["accuracy"] = dataclasses.replace(answers["accuracy"], stderr=3.1)
        write_run(tmp_path / "runs/vqa" / name, make_record(answers, "questions", settings={"derived": True}))
    captions = {"CIDEr": Metric(25.0, "CIDEr", count=142, baselines={"one caption for all": 5.5})}
    write_run(
        tmp_path / "runs/captioning/dense", make_record(captions, "captions", absent={"METEOR": "there is no Java"})
    )
    write_run(tmp_path / "runs/captioning/mhmoe", make_record({"CIDEr": Metric(30.0, "CIDEr")}, "captions"))
    return tmp_path / "runs"


def test_fine_tuned_models_stand_beside_guessing(tasks: Path, tmp_path: Path) -> None:
    text = report(tasks, tmp_path / "report.md", plots=False)
    rows = [{name: cell for name, cell in row.items() if name in ("model", "test questions", "test CIDEr")}
            for row in tables(text)[0]]  # fmt: skip
    assert [list(row.values()) for row in rows] == [
        ["dense", "41.25", "25.00"], ["mhmoe", "43.50", "30.00"], ["flops", "40.00", "–"], ["params", "37.50", "–"],
        ["*question only*", "37.50", "–"], ["*most frequent*", "20.00", "–"], ["*one caption for all*", "–", "5.50"],
    ]  # fmt: skip
    assert (
        "- test questions (37.50): dense +3.75 ± 2.78, mhmoe +6.00 ± 6.20, flops +2.50 ± 2.78, params +0.00 ± 2.78; "
        "**not clearly above it: mhmoe, flops, params**\n" in text
    )
    assert "- test CIDEr (5.50): dense +19.50, mhmoe +24.50\n" in text
    assert "METEOR is absent: there is no Java." in text and "neither VQAv2 nor NLVR2" in text


def test_the_last_table_is_the_papers_with_ours_beside_it(runs: Path, tmp_path: Path) -> None:
    paper = PaperTable("P1, table 5", "perplexity", {"dense": 16.23, "xmoe": 14.8}, note="250k updates")
    text = report(runs, tmp_path / "report.md", plots=False, paper=paper)
    assert [list(row.values()) for row in tables(text)[-1]] == [
        ["dense, paper", "16.23"], ["dense, ours", "20.00"], ["xmoe, paper", "14.8"]
    ]  # fmt: skip
    assert "P1, table 5: 250k updates. Ours: test split." in text
    ours = {"held out": "valid ppl", "50k": "valid ppl halfway", "end": "test ppl"}
    several = PaperTable("P", "accuracy", {"dense": {"held out": 3.0, "de": 33.0, "50k": 9.0}}, columns=ours)
    parts = {"de": {"accuracy": Metric(40.0, "%")}}
    write_run(runs / "dense", make_record({"accuracy": Metric(41.0, "%")}, "zero-shot", split="xnli", parts=parts))
    with (runs / "dense" / "train.log").open("a") as log:
        log.write('{"valid_num_updates": 4, "valid_ppl": "44.0"}\n')
    text = report(runs, tmp_path / "report.md", plots=False, paper=several)
    assert [list(row.values()) for row in tables(text)[-1]] == [
        ["dense, paper", "3.0", "33.0", "9.0", "–"], ["dense, ours", "21.00", "40.00", "44.00", "20.00"]
    ]  # fmt: skip


@pytest.mark.parametrize("field, reason", [("digest", "other data"), ("visual_tokenizer", "another visual tokenizer")])
def test_runs_of_other_data_are_refused(runs: Path, tmp_path: Path, field: str, reason: str) -> None:
    record = make_record(text_metrics(20.0))
    write_run(runs / "xmoe", dataclasses.replace(record, data={**record.data, field: "1" * 64}))
    with pytest.raises(ValueError, match=rf"xmoe was evaluated on {reason} .* than .*dense .*do not compare"):
        report(runs, tmp_path / "report.md")
    assert not (tmp_path / "report.md").exists()
    zero_shot = [make_record({"accuracy": Metric(40.0, "%")}, "zero-shot", split=name, data={"digest": name})
                 for name in ("xnli", "probe")]  # fmt: skip
    text = report(write_run(tmp_path / "other" / "dense", *zero_shot), tmp_path / "report.md", plots=False)
    assert row_of(text, "dense")["xnli accuracy"] == row_of(text, "dense")["probe accuracy"] == "40.00"


def test_tasks_have_a_map_of_their_experts_and_no_mean_beside_one_of_others(runs: Path, tmp_path: Path) -> None:
    guesses = {"chance": 50.0, "majority": 52.7}
    scores = {"RTE acc": {"accuracy": Metric(54.0, "%", 3.0, 277, guesses)}}
    for name, metrics in (("mhmoe", {"mean of 12 scores": Metric(30.0, "%", 0.5, 9, guesses)}),
                          ("dense", {"mean of 1 of 14 scores": Metric(54.0, "%", 3.0, 277, guesses)})):  # fmt: skip
        experts = loads((1, None, [4.0, 0, 0, 0]), (1, "rte", [4.0, 0, 0, 0])) if name == "mhmoe" else None
        metrics["active experts"] = Metric(25.0, "%")
        record = make_record(metrics, "zero-shot", name, split="english", parts=scores, experts=experts)
        write_record(record_file(runs / name, "zero-shot-english"), record)
    paper = PaperTable("P", "active experts", {"mhmoe": 90.71})
    text = report(runs, tmp_path / "report.md", paper=paper)
    assert "expert-activation-english.png" in text and "## Expert activation, english tasks" in text
    assert row_of(text, "mhmoe")["english mean of 12 scores"] == "30.00"
    assert row_of(text, "dense")["english mean of 12 scores"] == "–" and "of 14 scores" not in text
    assert row_of(text, "RTE acc", table=1) == {
        "": "RTE acc", "examples": "277", "dense, right": "54.00", "mhmoe, right": "54.00", "chance, right": "50.00",
        "majority, right": "52.70",
    }  # fmt: skip
    assert len(tables(text)[1]) == 1  # no row of the whole
    assert [list(row.values()) for row in tables(text)[-1]] == [["mhmoe, paper", "90.71"], ["mhmoe, ours", "25.00"]]


def test_one_name_is_one_model(runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other" / "dense", make_record(text_metrics(20.0)))
    with pytest.raises(ValueError, match="runs need different folder names: .* are both dense"):
        report([runs, tmp_path / "other"], tmp_path / "report.md")
    assert list(find_runs([runs], ["mhmoe", "dense"])) == ["mhmoe", "dense"]
    with pytest.raises(ValueError, match=r"--names: no run of xmoe \(there are dense, mhmoe\)"):
        find_runs([runs], ["xmoe"])


def test_models_that_differ_in_experts_alone_are_a_line_over_their_counted_experts(tmp_path: Path) -> None:
    def write(name: str, experts: int, seeds: list[float], counted: int, **settings: object) -> None:
        for seed, perplexity in enumerate(seeds, 1):
            record = make_record(text_metrics(perplexity, bits_per_byte=1.0), model="mhmoe")
            record.model["counts"] = record.model["counts"] | {"experts": counted}
            record.model["settings"] = {"model": {"moe_expert_count": experts, "moe_top_k": 2, **settings}}
            write_run(tmp_path / "runs" / name / f"seed-{seed}", record)

    for name, experts, seeds in (("x", 32, [8.0, 10.0]), ("b", 8, [20.0]), ("a-e128", 128, [7.0])):
        write(name, experts, seeds, counted=experts, mhmoe_budget=None)
        write(f"{name}-flops", experts, seeds, counted=4 * experts + 3, mhmoe_budget="flops")
    write("two", 8, [5.0], 8, moe_ffn_dim=16)
    write("sizes", 16, [5.0], 16, moe_ffn_dim=16)
    models = [read_model(name, folders) for name, folders in find_runs([tmp_path / "runs"]).items()]
    plots = [plot for plot in compose(models, folder="plots").plots if plot[0].startswith("experts ")]
    assert [(plot[0], plot[2], plot[4]) for plot in plots] == [(
        "experts test ppl",
        {"b": {8: [20.0], 32: [8.0, 10.0], 128: [7.0]}, "b-flops": {35: [20.0], 131: [8.0, 10.0], 515: [7.0]}},
        ("experts", "perplexity"),
    )]  # fmt: skip
    assert [path.read_bytes()[:4] for _, path in draw_all(tmp_path, plots)] == [PNG]


def test_speeds_stand_beside_the_papers(tmp_path: Path) -> None:
    values = {"output": 64.0, "input": 28.0, "prompt": 56.0}
    speeds = {f"{name} tokens/s": Metric(value, "tokens/s") for name, value in values.items()}
    write_run(tmp_path / "xmoe", make_record(text_metrics(20.0)), make_record(speeds, "speed", split="4x7+16"))
    columns = {"input": "4x7+16 input tokens/s", "output": "4x7+16 output tokens/s", "training": "tokens/s"}
    paper = PaperTable("P", "x", {"xmoe": {"input": 18.47, "output": 45.47, "training": 33.98}}, "", columns)
    text = report(tmp_path / "xmoe", tmp_path / "report.md", plots=False, paper=paper)
    row = row_of(text, "xmoe")
    assert (row["4x7+16 output tokens/s"], row["tokens/s"], row["test ppl"]) == ("64.0", "800", "20.00")
    assert "BATCHxPROMPT+NEW" in text and "4x7+16 input tokens/s" not in row
    assert row["4x7+16 prompt tokens/s"] == "56.0"
    assert list(row_of(text, "xmoe, paper", table=1).values()) == ["xmoe, paper", "18.47", "45.47", "33.98"]
    assert list(row_of(text, "xmoe, ours", table=1).values()) == ["xmoe, ours", "28.00", "64.00", "800.00"]

"""From finished runs to the tree of results, RESULTS.md and its pages, and back: what is kept, refused and noticed."""

import json
import re
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_stand_ins import Commands, reproduce

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.locks import LOCK, exclusive_lock
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments import results as written
from mhmoe_fairseq.experiments.plan import Plan

PAIR = ("table1", "--models", "dense", "xmoe", "--seeds", "1", "2", "3")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib (extra plots)")


@pytest.fixture
def finished(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, three seeds; the working folder is that of the tree."""
    monkeypatch.chdir(tmp_path)
    commands.perplexities = {"dense": 24.0, "xmoe": 22.0}
    assert reproduce(tmp_path, *PAIR) == 0
    return tmp_path / "out"


def keep(folder: Path, *words: str) -> int:
    return reproduce(folder, *(words or PAIR), "--keep")


def files(tree: Path) -> dict[str, bytes]:
    found = [path for path in sorted(tree.rglob("*")) if path.is_file() and path != tree / LOCK]
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in found}


def _change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# What a record may hold, and what is kept of it on a machine of the name node-7.
OF_THE_MACHINE: dict[str, object] = {
    "/mnt/of/xnli": "xnli",
    "/mnt/my disk/of xnli": "of xnli",
    "run --out '/mnt/my disk/of xnli' -x ~me/b ../../mnt/c": "run --out 'of xnli' -x b c",
    "file:///mnt/of/xnli and file://node-7/mnt/a": "xnli and a",
    "x=/mnt/a,/mnt/b:/mnt/c": "x=a,b:c",
    "node-7.local:29500 tcp://node-7:1 me@node-7": "HOST:29500 tcp://HOST:1 me@HOST",
    "yes/no, https://example.org/a/x, and/or": "yes/no, https://example.org/a/x, and/or",
}


def test_kept_runs_are_small_whole_and_without_paths_of_the_machine(
    finished: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    settings = {"values": list(OF_THE_MACHINE), "keys": {"/a/de": 1, "/b/de": 2, "file:///mnt/en": 3}}
    _change(finished / "dense" / "seed-2" / "record-test.json", settings=settings)
    assert keep(tmp_path) == 0
    kept, folder = files(tmp_path / "results"), "english_lm/dense/seed-2"
    assert len(kept) == 6 * 5 and f"kept: results/{folder}" in capsys.readouterr().out
    assert not any(str(tmp_path).encode() in content or b'"/' in content for content in kept.values())
    ours, theirs = (
        read_record(path / "record-test.json") for path in (tmp_path / "results" / folder, finished / "dense/seed-2")
    )
    assert (ours.metrics, ours.model["counts"]) == (theirs.metrics, theirs.model["counts"])
    assert ours.settings == {"values": list(OF_THE_MACHINE.values()), "keys": {"de (1)": 1, "de (2)": 2, "en": 3}}
    assert ours.data == {"path": "data/mix", "digest": "0" * 64, "source": "sentences"}
    assert "evaluate outputs/english_lm/dense/seed-2/checkpoint_best.pt --data data/mix" in ours.provenance["command"]
    command = kept[f"{folder}/command.sh"].decode()
    assert command.startswith(
        "#!/usr/bin/env bash\nfairseq-train data/mix --user-dir mhmoe_fairseq --arch dense_lm_tiny"
    )
    assert "--save-dir outputs/english_lm/dense/seed-2 --log-file outputs/english_lm/dense/seed-2/train.log" in command
    assert json.loads(kept[f"{folder}/train.log"].splitlines()[0]) == {
        "num_updates": 500, "loss": 5, "wps": 100, "wpb": 4096, "peak_gb": 1.5
    }  # fmt: skip
    assert keep(tmp_path) == 0 and files(tmp_path / "results") == kept  # replaced, nothing left beside


def test_a_kept_run_of_parts_says_what_they_took(commands: Commands, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("family", "--models", "smoe", "btx", "--seeds", "1")
    assert reproduce(tmp_path, *words) == 0 and keep(tmp_path, *words) == 0
    kept = files(tmp_path / "results")
    assert not [name for name in kept if "parts" in name]
    page = written.read_page(EXPERIMENTS["family"], tmp_path / "results")
    (run,) = page.models["btx"].runs
    assert (run.updates, run.log.num_updates, run.before["seed"]) == (1000, 300, 350)
    assert kept["english_lm/btx/seed-1/command.sh"].decode().count("outputs/english_lm/parts/btx/gcide/seed-1/") == 2
    verdicts = {claim.model: finding.verdict for claim, finding in zip(page.experiment.claims, page.findings)}
    assert verdicts["btx"] == "one seed: nothing claimed"  # compared, as of one length


def test_what_was_measured_of_a_kept_run_is_not_lost(finished: Path, tmp_path: Path, capsys) -> None:
    assert keep(tmp_path) == 0 and "not measured yet" not in capsys.readouterr().out
    table2 = ("table2", *PAIR[1:])
    assert keep(tmp_path, *table2) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("not measured yet: ") and said.count("record-zero-shot-english.json") == 6
    assert said.endswith(": mhmoe reproduce table2 does that")
    run, folder = finished / "dense" / "seed-2", tmp_path / "results" / "english_lm" / "dense" / "seed-2"
    record = run / "record-zero-shot-english.json"
    record.write_bytes((run / "record-test.json").read_bytes())
    assert keep(tmp_path, *table2) == 0 and capsys.readouterr().out.count("record-zero-shot-english.json") == 5
    before = files(tmp_path / "results")
    assert folder / record.name in [tmp_path / "results" / name for name in before]
    _change(record, checkpoint={"sha256": "1"})
    assert keep(tmp_path) == 2 and files(tmp_path / "results") == before
    assert f"{record} is of another checkpoint than record-test.json" in capsys.readouterr().err
    record.unlink()
    assert keep(tmp_path) == 2 and files(tmp_path / "results") == before
    assert "seed-2 has record-zero-shot-english.json, which" in capsys.readouterr().err
    (folder / record.name).unlink()
    _change(folder / "run.json", choice="--size small")
    assert keep(tmp_path) == 2 and "was trained with --size small, this with none" in capsys.readouterr().err


def test_one_command_at_a_time_writes_into_the_tree(finished: Path, tmp_path: Path, capsys) -> None:
    tree = tmp_path / "results"
    with exclusive_lock(tree / LOCK, "--results"):
        assert keep(tmp_path) == 2 and not files(tree)
    assert "--results results: another run is writing there" in capsys.readouterr().err
    assert keep(tmp_path) == 0 and files(tree)


def test_loads_are_kept_as_whole_numbers_on_one_line(finished: Path, tmp_path: Path) -> None:
    file = finished / "xmoe" / "seed-1" / "record-test.json"
    row = {
        "layer": 1,
        "loads": [float(n) for n in range(256)],
        "part": "en",
        "pool": None,
        "dropped": 0.5,
        "entropy": 1.5,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), "experts": {"layers": [row] * 90}}))
    assert keep(tmp_path) == 0
    copy = tmp_path / "results" / "english_lm" / "xmoe" / "seed-1" / file.name
    assert read_record(copy).experts == read_record(file).experts and copy.stat().st_size < 150_000
    assert re.search(r'"loads": \[0, 1, 2, .*, 255\]\n?', copy.read_text())


def test_what_commands_leave_beside_the_runs_is_kept_and_shown(
    commands: Commands, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("figure8", "--models", "mhmoe-params", "--", "--img-size", "32")
    to_keep, left, tree = (*words[:3], "--keep", *words[3:]), tmp_path / "out" / "figure8", tmp_path / "results"
    assert reproduce(tmp_path, *words) == 0 and reproduce(tmp_path, *to_keep) == 0
    assert f"not measured yet: {left / 'diversity.json'}: " in capsys.readouterr().out
    assert not (tree / "masked_multimodal" / "figure8").exists()
    left.mkdir()
    (left / "diversity.json").write_text(json.dumps({"checkpoints": [str(tmp_path / "out" / "a.pt")]}))
    (left / "patches.png").touch()
    assert reproduce(tmp_path, *to_keep) == 0
    kept = json.loads((tree / "masked_multimodal" / "figure8" / "diversity.json").read_text())
    assert kept == {"checkpoints": ["outputs/masked_multimodal/a.pt"]}
    page = written.read_page(EXPERIMENTS["figure8"], Path("results"))
    assert page.command == "mhmoe reproduce figure8 -- --img-size 32"
    assert "](../../results/masked_multimodal/figure8/patches.png)" in written._report(page, Path("results")).text
    before = files(tree)
    for spoil, message in ((lambda file: file.write_text('{"che'), "diversity.json"), (Path.unlink, "which .* lacks")):
        spoil(left / "diversity.json")
        capsys.readouterr()
        assert reproduce(tmp_path, *to_keep) == 2 and files(tree) == before
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: (run / "record-test.json").write_text('{"schema": '), "lacks a whole record of a split"),
        (lambda run: _change(run / "run.json", finished=False), "xmoe/seed-3 in .* is cut off: finish it"),
        (lambda run: shutil.rmtree(run), "is missing: finish it with mhmoe reproduce"),
        (lambda run: (run / "train.log").write_text('{"num_updates": 2}'), "logged 2 updates, but table1 takes 1000"),
        (lambda run: _change(run / "record-test.json", data={"digest": "1"}), "was evaluated on other data"),
        (lambda run: _change(run.parents[1] / "search.json", date={"xmoe": "9"}), "before its learning rate was"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_kept(spoil, message: str, finished: Path, tmp_path: Path, capsys) -> None:
    (finished / "search.json").write_text("{}")
    spoil(finished / "xmoe" / "seed-3")
    assert keep(tmp_path) == 2
    assert re.search(message, capsys.readouterr().err) and not files(tmp_path / "results")


def test_runs_of_another_length_or_other_data_than_the_kept_ones_are_refused(
    finished: Path, tmp_path: Path, capsys
) -> None:
    assert keep(tmp_path, *PAIR, "--updates", "4") == 2
    assert "--updates (4) with --keep" in capsys.readouterr().err
    assert reproduce(tmp_path, "table1", "--models", "dense", "--updates", "4") == 0  # a smoke run in its place
    assert keep(tmp_path) == 2
    assert "dense/seed-1 in" in (said := capsys.readouterr().err) and "was trained with other flags" in said
    assert keep(tmp_path, "table1", "--models", "xmoe", "--seeds", "2") == 0
    kept = tmp_path / "results" / "english_lm" / "xmoe" / "seed-2" / "run.json"
    before = kept.read_text()
    kept.write_text(before.replace('"4e-3"', '"9e-3"'))
    assert keep(tmp_path, "table1", "--models", "xmoe", "--seeds", "1") == 2
    assert "seed-2 was trained with another --lr than xmoe/seed-1: keep" in capsys.readouterr().err
    kept.write_text(before)
    for run in (finished / "xmoe").iterdir():
        _change(run / "record-test.json", data={"digest": "1"})
        _change(run / "record-valid.json", data={"digest": "1"})
    assert keep(tmp_path, "table1", "--models", "xmoe", "--seeds", "1") == 2
    assert "was evaluated on other data" in capsys.readouterr().err
    assert keep(tmp_path, "table1", "--models", "xmoe", "--seeds", "2") == 0  # in the place of what was of other data


@needs_matplotlib
def test_the_report_is_what_the_records_give_and_a_changed_digit_is_noticed(
    finished: Path, tmp_path: Path, capsys
) -> None:
    (finished / "search.json").write_text(
        json.dumps(
            {
                "valid_loss_bits": {
                    "xmoe": {"1.6e-2": 5.4, "4e-3": 5.1234, "8e-3": 5.2},
                    "dense": {"4e-3": None, "8e-3": 5.1, "1.6e-2": 5.3},
                },
                "best_lr": {"xmoe": "4e-3", "dense": "8e-3"},
            }
        )
    )
    assert keep(tmp_path) == 0 and mhmoe(["reproduce", "--report"]) == 0
    results, page = tmp_path / "RESULTS.md", tmp_path / "docs" / "results" / "table1.md"
    text, of_page = results.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "xmoe has a lower perplexity than dense" in line)
    assert [cell.strip() for cell in row.split("|")[2:6]] == [
        "-8.7 %", "22.20 ± 0.10 against 24.20 ± 0.10: -8.26 % [-8.35, -8.18], n = 3", "[seen](docs/results/table1.md)",
        "4.1M tokens, 1,000 updates",
    ]  # fmt: skip
    assert "of at least 3 seeds: 1, of which 1 are seen or refuted; of as many pairs of equal models 0.1 would" in text
    assert text.index("## Claims") < text.index("## table1") and "table5`" in text.split("Without records yet")[1]
    assert "[-8.35, -8.18]" in of_page and "](../../results/english_lm/xmoe/seed-3)" in of_page
    assert "P1 table 1" in of_page and "16.23" in of_page
    assert re.search(r"\| xmoe +\| \*\*5\.123\*\* \(edge\) \| +5\.200 \| +5\.400 \|", of_page)
    assert re.search(r"\| dense +\| +– \| +\*\*5\.100\*\* \| +5\.300 \|", of_page)
    assert all((page.parent / name).is_file() for name in re.findall(r"!\[.*?\]\((.*?)\)", of_page))
    assert mhmoe(["reproduce", "--report"]) == 0 and results.read_text(encoding="utf-8") == text

    def check() -> int:
        return mhmoe(["reproduce", "--report", "--check"])

    assert check() == 0
    for file in (results, page):
        whole = file.read_text(encoding="utf-8")
        file.write_text(whole.replace("22.20", "22.21", 1), encoding="utf-8")
        capsys.readouterr()
        assert check() == 1 and re.search(rf"{file.name}:\d+: .*22.21", capsys.readouterr().out)
        file.write_text(whole, encoding="utf-8")
    record = tmp_path / "results" / "english_lm" / "dense" / "seed-1" / "record-test.json"
    record.write_text(record.read_text().replace('"value": 24.1', '"value": 24.2'))
    assert check() == 1
    assert mhmoe(["reproduce", "--report"]) == 0 and check() == 0
    for plot in (next(page.parent.glob("table1-plots/*.png")), page.parent / "claims.png"):
        whole_plot = plot.read_bytes()
        plot.unlink()
        assert check() == 1 and f"{plot.relative_to(tmp_path)}: is missing" in capsys.readouterr().out
        plot.write_bytes(whole_plot)
    _change(record, provenance={"date": "1", "earlier": ["0"]})
    _change(tmp_path / "results" / "english_lm" / "search.json", date={"dense": "2"})
    assert mhmoe(["reproduce", "--report"]) == 0
    assert "test split more than once, earlier: dense, seed-1 (0)." in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert check() == 1 and capsys.readouterr().out.count("was tested (1) before its learning rate was chosen (2)") == 1
    assert mhmoe(["reproduce", "--check"]) == 2 and mhmoe(["reproduce", "--report", "--results", "none"]) == 2


@needs_matplotlib
def test_the_plot_of_claims_has_each_pair_once_with_its_interval_and_the_papers_change(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(written, "draw_changes", lambda path, rows, *_: drawn.append(rows))
    assert keep(tmp_path) == 0 and mhmoe(["reproduce", "--report"]) == 0
    assert drawn[0] == {
        "table1: xmoe / dense": ("seen", [pytest.approx(x, abs=0.01) for x in (-8.35, -8.26, -8.18, -8.7)])
    }
    shutil.rmtree(tmp_path / "results" / "english_lm" / "xmoe" / "seed-2")
    shutil.rmtree(tmp_path / "results" / "english_lm" / "xmoe" / "seed-3")
    assert mhmoe(["reproduce", "--report"]) == 0 and len(drawn) == 1  # one seed has no interval
    assert "claims.png" not in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


@needs_matplotlib
def test_pages_and_plots_of_records_that_are_gone_are_noticed_and_removed(
    finished: Path, tmp_path: Path, capsys
) -> None:
    assert keep(tmp_path) == 0 and mhmoe(["reproduce", "--report"]) == 0
    pages = tmp_path / "docs" / "results"
    (pages / "earlier-studies.md").write_text("# Earlier studies\n")
    (pages / "table1-plots" / "another.png").touch()
    before = files(pages)
    shutil.rmtree(tmp_path / "results" / "english_lm" / "xmoe")
    capsys.readouterr()
    assert mhmoe(["reproduce", "--report", "--check"]) == 1
    told = capsys.readouterr().out
    assert "docs/results/table5.md: no record gives it" in told and "another.png: no record gives it" in told
    assert files(pages) == before
    assert mhmoe(["reproduce", "--report"]) == 0 and "removed: docs/results/table5.md" in capsys.readouterr().out
    assert mhmoe(["reproduce", "--report", "--check"]) == 0
    kept = files(pages)
    assert "table1.md" in kept and "earlier-studies.md" in kept and "table5.md" not in kept
    assert "table1-plots/another.png" not in kept and not (pages / "table5-plots").exists()
    record = tmp_path / "results" / "english_lm" / "dense" / "seed-1" / "record-test.json"
    record.write_bytes(record.read_bytes()[:-20])  # half a record is none
    for words in (["--report"], ["--report", "--check"], ["--list"]):
        assert mhmoe(["reproduce", *words]) == 2 and "dense/seed-1/record-test.json" in capsys.readouterr().err


def test_the_committed_results_are_what_their_records_give(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    assert mhmoe(["reproduce", "--report", "--check"]) == 0
    for name, content in files(repository / "results").items():
        if Path(name).suffix == ".png":  # any bytes may be in a picture
            continue
        assert not re.search(rb'"/|(?<![\w./-])/(home|root|tmp|work|usr/(?!bin/env))', content), name
        if Path(name).name == "record-test.json":
            valid = (repository / "results" / name).with_name("record-valid.json")
            dates = [read_record(file).provenance["date"] for file in (valid, repository / "results" / name)]
            assert dates == sorted(dates)


def test_the_committed_runs_are_what_their_experiments_train(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed recipe or model makes other runs: those that are kept are trained anew, or spelled as they were."""
    monkeypatch.chdir(repository)
    for experiment in EXPERIMENTS.values():
        for run in Plan(experiment, Path("results") / experiment.folder).runs():
            kept = json.loads(file.read_text()) if (file := run.folder / "run.json").is_file() else None
            if kept is not None and not kept["choice"]:
                command = [word.replace("results/", "outputs/", 1) for word in run.identity()["command"]]
                assert command == kept["command"], run.name


def test_the_list_says_what_each_costs_how_far_it_is_and_what_it_showed(finished: Path, tmp_path: Path, capsys) -> None:
    assert keep(tmp_path) == 0
    (tmp_path / "outputs").mkdir()
    shutil.move(finished, tmp_path / "outputs" / "english_lm")
    capsys.readouterr()
    assert mhmoe(["reproduce", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    # 24 trainings of 1,000 updates of 4,096 tokens and 24 of a search of 200; at 100 tokens per second, in hours.
    # Nothing is taken for done: the data are not the default's.
    assert re.search(r"P1 table 1 +8 x 3 x 1,000 +118\.0M +327\.7 +0 of 48 +1 seen, 3 not run", lines["table1"])
    # Branches and their mix are together as long as any other training.
    assert re.search(r"ours +16 x 3 x 1,000 +235\.9M +655\.4 +0 of ", lines["family"])
    assert " ? " in lines["table1-multimodal"] and re.search(r"P2 table 3 +5 x 3 x 1,000 ", lines["p2-table3"])
    assert all(len(line) <= 120 for name, line in lines.items() if name not in ("hours:", "mhmoe"))
    assert mhmoe(["reproduce", "table1", "--list"]) == 0
    told = capsys.readouterr().out
    assert "mhmoe prepare english --source mix" in told
    assert "claim: xmoe has a lower perplexity than dense: seen (-8.26 % ± 0.03, n = 3)" in told
    assert mhmoe(["reproduce", "p2-table4", "--list"]) == 0
    models = re.search(r"models: (.*)", capsys.readouterr().out)[1].split(", ")
    assert mhmoe(["reproduce", "p2-table4", "--dry-run", "--models", *models]) == 0

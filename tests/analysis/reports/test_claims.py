"""Verdicts on claims: Student's quantiles by integration, the interval, the rule, and what is compared."""

import math
from pathlib import Path

import numpy as np
import pytest
from written_runs import loads, make_record, text_metrics, write_run

from mhmoe_fairseq.analysis.reports.claims import T_QUANTILES, Claim, interval, judge, verdict_of
from mhmoe_fairseq.analysis.reports.runs import BEFORE, Model, read_model
from mhmoe_fairseq.common.files import write_json
from mhmoe_fairseq.evaluation.records import Metric, record_file, write_record

BETTER = Claim("MH-MoE is better", "mhmoe", "xmoe")


@pytest.mark.parametrize("degrees", range(1, len(T_QUANTILES) + 1))
def test_quantiles_are_students(degrees: int) -> None:
    """Two and a half percent of the density lie above; with t = sqrt(n) tan(a) the integral has a finite range."""
    angle = math.atan(T_QUANTILES[degrees - 1] / math.sqrt(degrees))

    def mass(low: float) -> float:
        edges = np.linspace(low, math.pi / 2, 200_001)
        middles = (edges[1:] + edges[:-1]) / 2
        return float((np.cos(middles) ** (degrees - 1)).sum() * (edges[1] - edges[0]))

    assert mass(angle) / mass(-math.pi / 2) == pytest.approx(0.025, abs=4e-6)


def test_the_interval_is_the_mean_and_t_standard_errors() -> None:
    low, high = interval([1.0, 2.0, 6.0])
    half = 4.3027 * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert interval([1.0]) is None and interval([]) is None


@pytest.mark.parametrize(
    "changes, lower_is_better, verdict",
    [
        ([-5.0, -5.2, -4.8], True, "seen"),
        ([-5.0, -5.2, -4.8], False, "refuted at this scale"),
        ([5.0, 5.2, 4.8], True, "refuted at this scale"),
        ([5.0, 5.2, 4.8], False, "seen"),
        ([-1.0, -3.0, -0.2], True, "not seen"),  # all on one side, but three seeds of this spread do not show it
        ([-5.0], True, "one seed: nothing claimed"),
        ([-5.0, -5.1], True, "2 seeds: nothing claimed"),
        ([], True, "not run"),
    ],
)
def test_the_rule(changes: list[float], lower_is_better: bool, verdict: str) -> None:
    assert verdict_of(changes, lower_is_better) == verdict


def models_of(folder: Path, **perplexities: list[float]) -> dict[str, Model]:
    """Models by name with a run for each seed from 1 on."""
    found = {}
    for name, values in perplexities.items():
        runs = [write_run(folder / name / f"seed-{seed}", make_record(text_metrics(value), model="mhmoe"))
                for seed, value in enumerate(values, start=1)]  # fmt: skip
        found[name] = read_model(name, runs)
    return found


def test_seeds_are_paired_and_only_like_is_compared(tmp_path: Path) -> None:
    # Seeds differ by far more than the models do: only pairs show it.
    models = models_of(tmp_path, mhmoe=[10.0, 20.0, 40.0, 1.0], xmoe=[10.1, 20.22, 40.48])
    finding = judge(BETTER, models)
    assert finding.verdict == "seen" and list(finding.changes) == ["seed-1", "seed-2", "seed-3"]
    assert finding.changes["seed-3"] == pytest.approx(100 * (40 / 40.48 - 1))
    assert finding.values == ("23.33 ± 15.28", "23.60 ± 15.47") and finding.scale == "8 updates"
    assert judge(Claim("", "xmoe", "mhmoe"), models).verdict == "refuted at this scale"
    assert judge(Claim("", "mhmoe", "dense"), models).verdict == "not run"
    assert judge(Claim("", "mhmoe", "xmoe", part="en"), models).verdict == "not run"
    write_run(tmp_path / "xmoe" / "seed-3", make_record(text_metrics(40.48)), updates=4)
    models["xmoe"] = read_model("xmoe", sorted((tmp_path / "xmoe").iterdir()))
    assert judge(BETTER, models).verdict == "2 seeds: nothing claimed"  # half as long is another training
    write_json(tmp_path / "xmoe" / "seed-3" / BEFORE, {"seed": 3, "law": 1})  # unless the rest was spent before
    models["xmoe"] = read_model("xmoe", sorted((tmp_path / "xmoe").iterdir()))
    assert judge(BETTER, models).verdict == "seen"


def test_scores_are_compared_by_points_and_experts_and_speeds_by_the_same_rule(tmp_path: Path) -> None:
    for name, points, load in (("mhmoe", 3.0, [1.0, 1.0]), ("xmoe", 1.0, [1.0, 0.0])):
        for seed in (1, 2, 3):
            metrics = {"accuracy": Metric(40.0 + points + seed / 10, "%")}
            parts = {"de": {"accuracy": Metric(0.0 if name == "xmoe" else seed / 10, "%")}}
            experts = loads((0, None, load))
            record = make_record(metrics, "classification", model="mhmoe", experts=experts, parts=parts)
            write_run(tmp_path / name / f"seed-{seed}", record)
    models = {name: read_model(name, sorted((tmp_path / name).iterdir())) for name in ("mhmoe", "xmoe")}
    finding = judge(BETTER, models)
    assert (finding.verdict, finding.change, finding.interval) == ("seen", "+2.00 points ± 0.00", "[+2.00, +2.00]")
    assert judge(Claim("", "mhmoe", "xmoe", part="de"), models).changes["seed-2"] == pytest.approx(0.2)
    between = Claim("", "mhmoe", "mhmoe", metric="accuracy", part="de", reference_part="en")
    for run in (tmp_path / "mhmoe").iterdir():
        german, english = ({"accuracy": Metric(value, "experts")} for value in (3.3, 3.0))
        record = make_record(german, "classification", model="mhmoe", parts={"de": german, "en": english})
        models["of parts"] = read_model("mhmoe", [write_run(run, record)])
    of_part = judge(between, {"mhmoe": models["of parts"]})
    assert of_part.change == "+10.00 %" and of_part.verdict == "one seed: nothing claimed"
    told, mixed = (
        make_record(text_metrics(value), what) for value, what in ((9.0, "perplexity"), (22.0, "domain mixture"))
    )
    demix = write_run(tmp_path / "demix" / "seed-1", told)
    write_record(record_file(demix, "test-exact"), mixed)
    sparse = write_run(tmp_path / "sparse" / "seed-1", make_record(text_metrics(20.0)))
    of_domains = {name: read_model(name, [run]) for name, run in (("demix", demix), ("sparse", sparse))}
    not_told = Claim("", "demix", "sparse", metric="perplexity", what="domain mixture", reference_what="perplexity")
    assert judge(not_told, of_domains).change == "+10.00 %"
    active = judge(Claim("", "mhmoe", "xmoe", metric="active experts"), models)
    assert (active.verdict, active.change) == ("seen", "+50.00 points ± 0.00")
    on_tasks = Claim("", "mhmoe", "xmoe", metric="active experts", what="zero-shot", split="english")
    assert judge(on_tasks, models).verdict == "not run"  # other text's experts do not stand for the tasks'
    assert judge(Claim("", "mhmoe", "xmoe", metric="tokens/s"), models).verdict == "not seen"
    assert judge(Claim("", "mhmoe", "xmoe", metric="balance loss"), models).changes["seed-1"] == 0

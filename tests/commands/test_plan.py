"""``mhmoe plan`` against P1's table 11 and against models that are really built."""

import json
import re
from pathlib import Path

import pytest
from language_models import SMALL, count_model, small_dictionary, small_model

from mhmoe_fairseq.analysis.plan.planning import PlanSettings, plan
from mhmoe_fairseq.analysis.plan.table_11 import PAPER_VOCAB_SIZES, TABLE_11
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models import precision
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import count_built

EXPERTS = [8, 16, 32, 64, 128, 256]
MILLION = 10**6


@pytest.fixture(scope="module")
def table_11() -> dict:
    rows = plan(PlanSettings("mhmoe_lm_base", PAPER_VOCAB_SIZES["lm"], tuple(EXPERTS)))
    return {(row.family, row.experts): row for row in rows}


def test_dense_has_the_papers_162_million(table_11: dict) -> None:
    counts = table_11["dense", None].counts
    assert counts.total == 162_160_896
    assert round(counts.total / MILLION) == TABLE_11["lm", "dense"][None][2]
    assert counts.active == counts.total


@pytest.mark.parametrize("experts", EXPERTS)
def test_every_xmoe_row_is_within_a_million_of_the_paper(table_11: dict, experts: int) -> None:
    counts, paper = table_11["xmoe", experts].counts, TABLE_11["lm", "xmoe"][experts]
    for ours, printed in zip((counts.non_expert, counts.expert, counts.total), paper):
        assert abs(ours - printed * MILLION) < MILLION


@pytest.mark.parametrize("experts", EXPERTS)
def test_mhmoe_spends_at_most_xmoes_parameters_and_nearly_all_of_them(table_11: dict, experts: int) -> None:
    ours, reference = table_11["mhmoe", experts].counts, table_11["xmoe", experts].counts
    assert 0.995 * reference.total <= ours.total <= reference.total
    assert round(ours.non_expert / MILLION) == TABLE_11["lm", "mhmoe"][experts][0]
    assert ours.moe.num_experts == reference.moe.num_experts == experts


def test_the_table_shows_the_papers_numbers_beside_ours_and_labels_them(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--arch", "mhmoe_lm_base", "--experts", "64"]) == 0
    text = capsys.readouterr().out
    assert "paper: P1 (arXiv 2404.15045), table 11" in text
    (xmoe,) = [line for line in text.splitlines() if line.startswith("| xmoe")]
    assert "1,949.64M" in xmoe and xmoe.endswith("1,949M |")
    (mhmoe,) = [line for line in text.splitlines() if line.startswith("| mhmoe")]
    assert mhmoe.endswith("1,938M |")


def test_the_written_table_has_our_counts_and_the_papers_numbers(table_11: dict) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "results" / "table11.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| (none|\d)", line)]
    assert [row[0] for row in rows] == ["none (dense)", *map(str, EXPERTS)]
    for row in rows:
        experts = int(row[0]) if row[0].isdigit() else None
        families = ("xmoe", "mhmoe") if experts else ("dense",)
        counts = [table_11[family, experts].counts for family in families]
        ours = [f"{of.total / MILLION:,.2f}M" for of in counts]
        paper = [f"{TABLE_11['lm', family][experts][2]:,}M" for family in families]
        width = [f"{counts[-1].moe.expert_ffn_dim:,}"] if experts else []
        assert row[1:] == [*(cell for pair in zip(ours, paper) for cell in pair)][:3] + width + paper[1:]


@pytest.mark.parametrize("flags", [["--budget", "flops"], ["--heads", "2"], ["--vocab-size", "8000"], ["--rms-norm"]])
def test_the_papers_numbers_only_stand_beside_the_papers_settings(
    flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", "--arch", "mhmoe_lm_base", *flags]) == 0
    assert "paper" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["dense", "smoe", "xmoe", "mhmoe"])
def test_counts_are_those_of_the_built_model(family: str) -> None:
    model = small_model(f"{family}_lm_tiny")
    counts = count_built(model, context=16)
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts.total == sum(named.values())
    assert counts.expert == sum(size for name, size in named.items() if ".experts." in name)
    if family != "dense":
        per_expert = counts.expert // counts.moe.num_experts
        assert counts.active == counts.total - per_expert * (counts.moe.num_experts - counts.moe.top_k)


def test_meta_counts_equal_the_built_models() -> None:
    options = architecture_options("mhmoe_lm_tiny", mhmoe_budget="none", dropout=0.0, **SMALL)
    options.tokens_per_sample = 16
    assert count_model(options) == count_built(small_model("mhmoe_lm_tiny"), 16)


@pytest.mark.parametrize(
    "flags",
    [
        {"mhmoe_routing": "torchscale"},
        {"activation_fn": "silu", "no_bias": True, "rms_norm": True},
        {"mhmoe_shared_expert_dim": 24, "mhmoe_router": "linear"},
        {"decoder_learned_pos": True, "moe_freq": 1},
    ],
    ids=str,
)
def test_counts_of_other_models(flags: dict) -> None:
    options = architecture_options("xmoe_lm_tiny", dropout=0.0, **SMALL, **flags)
    built = small_model("xmoe_lm_tiny", **flags)
    counts = count_model(options)
    assert counts.total == sum(parameter.numel() for parameter in built.parameters())
    assert counts.expert == sum(
        parameter.numel() for name, parameter in built.named_parameters() if ".experts." in name
    )


def test_flops_of_a_dense_model_by_hand() -> None:
    counts = count_built(small_model("dense_lm_tiny"), context=7)
    dim, ffn, layers, words = 32, 64, 2, len(small_dictionary())
    matrices = layers * (4 * dim * dim + 2 * dim * ffn) + dim * words
    attention = layers * 2 * dim * 4  # scores and weighted sum, (7 + 1) / 2 visible tokens
    assert counts.flops_per_token == 2 * (matrices + attention)


def test_flops_budget_keeps_flops_and_json_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", "--arch", "mhmoe_lm_base", "--budget", "flops", "--experts", "32", "--json", str(path)]) == 0
    _, xmoe, mhmoe = json.loads(path.read_text())
    assert (xmoe["family"], mhmoe["family"], mhmoe["num_heads"]) == ("xmoe", "mhmoe", 4)
    assert mhmoe["flops_per_token"] == pytest.approx(xmoe["flops_per_token"], rel=0.005)
    assert mhmoe["num_experts"] > xmoe["num_experts"] == 32


def test_granularity_is_of_the_model_not_of_its_reference_and_survives_rounding(tmp_path: Path, capsys) -> None:
    words, path = ["plan", "--budget", "flops", "--mhmoe-granularity", "4"], tmp_path / "plan.json"
    for ranks, experts in ((), 142), (("--ranks", "32"), 128):
        assert main([*words, *ranks, "--json", str(path)]) == 0
        _, xmoe, mhmoe = json.loads(path.read_text())
        of_both = [[of[name] for name in ("num_experts", "top_k", "expert_ffn_dim")] for of in (xmoe, mhmoe)]
        assert of_both == [[8, 2, 3072], [experts, 8, 672]]
        assert mhmoe["flops_per_token"] == pytest.approx(xmoe["flops_per_token"], rel=0.01)
    said = capsys.readouterr().out
    assert "--mhmoe-budget none --moe-ffn-dim 672 --moe-expert-count 128 --moe-top-k 8" in said
    (row,) = {line.split("|")[4].strip() for line in said.splitlines() if line.startswith("| mhmoe ") and "672" in line}
    assert row == "8"


def test_any_other_architecture_and_option(capsys: pytest.CaptureFixture) -> None:
    flags = ["--experts", "4", "--vocab-size", "500", "--ffn-dim", "128", "--top-k", "1", "--layers", "2"]
    assert main(["plan", "--arch", "smoe_lm_tiny", *flags]) == 0
    models = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert models[2:] == ["dense", "smoe"]


def test_a_fine_grained_model_stands_beside_the_layer_whose_budget_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for words, shared, size in (([], 1, 31), (["--mhmoe-shared-experts", "2", "--ranks", "4"], 2, 30)):
        assert main(["plan", "--arch", "deepseekmoe_lm_base", *words, "--json", str(path)]) == 0
        _, smoe, ours = json.loads(path.read_text())
        assert (smoe["family"], smoe["num_experts"], smoe["top_k"]) == ("smoe", 8, 2)
        assert (ours["num_experts"], ours["top_k"], ours["expert_ffn_dim"]) == (size, 8 - shared, 768)
        assert ours["flops_per_token"] == pytest.approx(smoe["flops_per_token"], rel=0.002)


def test_a_zero_is_given_as_any_other_number(tmp_path: Path) -> None:
    found = {}
    for arch, *flags in (
        ("mhmoe_lm_base",), ("mhmoe_lm_base", "--mhmoe-projection-layers", "0"),
        ("deepseekmoe_lm_base", "--mhmoe-shared-experts", "0"), ("olmoe_lm_base",),
    ):  # fmt: skip
        path = tmp_path / "plan.json"
        assert main(["plan", "--arch", arch, *flags, "--mhmoe-budget", "none", "--json", str(path)]) == 0
        found[(arch, *flags)] = json.loads(path.read_text())[-1]
    with_projections, without, not_shared, olmoe = found.values()
    assert with_projections["non_expert_params"] - without["non_expert_params"] == 6 * 2 * (768 * 768 + 768)
    same = ("num_experts", "top_k", "expert_ffn_dim", "flops_per_token")
    assert [not_shared[name] for name in same] == [olmoe[name] for name in same]


def test_bytes_of_a_number_are_those_of_this_machine(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(precision, "device_type_of", lambda options: "cpu")
    for can_multiply, size in ((True, 2), (False, 4)):
        monkeypatch.setattr(precision, "_instructions", lambda found=can_multiply: {"avx512_bf16": found})
        assert main(["plan", "--ranks", "4", "--mhmoe-precision", "auto"]) == 0
        assert f"{size} bytes a number" in capsys.readouterr().out


def test_the_models_flags_are_listed_when_asked_for(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--help-model"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--moe-freq", "--decoder-layers", "--encoder-layers", "--mhmoe-router-preset"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "mhmoe_lm"], r"--arch \(mhmoe_lm\) must be one of deepseekmoe_beit3_base"),
        (["--arch", "mhmoe_lm_huge"], "must be one of"),
        (["--heads", "5"], r"--mhmoe-heads-number \(5\) must divide --decoder-embed-dim \(768\)"),
        (["--experts", "0"], r"--experts \(0\) must be at least 1"),
        (["--experts", "8", "--moe-expert-count", "8"], "give one"),
        (["--vocab-size", "3"], r"--vocab-size \(3\)"),
        (["--arch", "dense_lm_base", "--heads", "2"], "--mhmoe-heads-number needs MoE layers"),
        (["--link", "100"], r"--link \(100.0\) needs --ranks"),
        (["--cpu"], "--cpu needs --ranks"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mhmoe plan: error: ") and error.count("\n") == 1
    assert re.search(message, error)

"""``mhmoe plan`` of BEiT-3: parts that add up, FLOPs by hand, the paper's multimodal rows beside them."""

import json
import re
from pathlib import Path

import pytest
from beit3_models import FAMILIES, IMAGES, SMALL, beit3_dictionary, small_beit3

from mhmoe_fairseq.checkpoints.summary import count_parts
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.counts import build_on_meta, count_built


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", ["shared", "separate"])
def test_counts_are_those_of_the_built_model(family: str, experts: str) -> None:
    flags = {} if family == "dense" else {"mhmoe_modality_experts": experts}
    model = small_beit3(f"{family}_beit3_tiny", **flags)
    named = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts, parts = count_built(model, context=17), count_parts(model.named_parameters())
    assert counts.total == sum(named.values()) == sum(parts.values())
    assert counts.expert == parts.get("experts", 0)
    assert counts.expert == sum(size for name, size in named.items() if ".experts." in name)
    if family != "dense":
        pools = 2 if experts == "separate" else 1
        one = counts.expert // (pools * counts.moe.num_experts)
        assert counts.active == counts.total - one * (pools * counts.moe.num_experts - counts.moe.top_k)


def test_counts_on_meta_and_parts_by_hand() -> None:
    options = architecture_options("dense_beit3_tiny", **SMALL, **IMAGES)
    model = build_on_meta(options, beit3_dictionary(), num_visual_tokens=6)
    assert all(parameter.is_meta for parameter in model.parameters())
    words, dim, ffn, layers = len(beit3_dictionary()), 32, 64, 2
    assert count_parts(model.named_parameters()) == {
        "attention": 2 * layers * (4 * (dim * dim + dim) + 2 * dim),
        "dense networks": 2 * layers * (2 * dim * ffn + ffn + dim + 2 * ffn),
        "text embedding": words * dim,
        "patch embedding": 3 * 4 * 4 * dim + dim + 2 * dim,
        "positions": (2 + 1 + 4 + 2 + 12) * dim,
        "text head": words * dim + words,
        "image head": 6 * dim + 6,
        "norms": 2 * (2 * layers + 1) * 2 * dim,
    }


def test_flops_of_one_position_by_hand() -> None:
    counts = count_built(small_beit3("dense_beit3_tiny"), context=17)
    dim, ffn, layers = 32, 64, 2
    assert counts.flops_per_token == 2 * layers * (4 * dim * dim + 2 * dim * ffn + 2 * dim * 17)


def test_the_papers_rows_stand_beside_ours(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", "--arch", "mhmoe_beit3_base", "--experts", "8", "32", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "vocabulary 64,010, text head of its own" in text
    rows = [line for line in text.splitlines() if re.match(r"\| (dense|xmoe|mhmoe) +\|", line)]
    assert [row.split("|")[-2].strip() for row in rows] == ["277M", "514M", "1,228M", "505M", "1,209M"]
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| text")] == [
        "text embedding",
        "text head",
    ]
    assert "does not say how its multimodal rows come about" in text
    dense, xmoe, _, mhmoe, _ = json.loads(path.read_text())
    assert sum(dense["params_by_part"].values()) == dense["total_params"]
    assert 0.995 * xmoe["total_params"] <= mhmoe["total_params"] <= xmoe["total_params"]
    assert mhmoe["context"] == 1 + 196 + 64


def test_other_settings_stand_alone(capsys: pytest.CaptureFixture) -> None:
    words = "--layers 2 --ffn-dim 64 --vocab-size 500 --img-size 32 --patch-size 8 --visual-tokens 20 --budget none"
    assert main(["plan", "--arch", "mhmoe_beit3_tiny", *words.split()]) == 0
    text = capsys.readouterr().out
    assert "paper" not in text and "attention over 81 positions" in text
    assert main(["plan", "--arch", "mhmoe_beit3_base", "--visual-tokens", "512"]) == 0
    assert "paper" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ranks", "8"], "--ranks plans language models, not --arch mhmoe_beit3_base"),
        (["--decoder-layers", "2"], "--decoder-layers is not an option of dense_beit3_base"),
        (["--img-size", "30"], r"--patch-size \(16\) must divide --img-size \(30\)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--arch", "mhmoe_beit3_base", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)

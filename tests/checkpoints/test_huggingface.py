"""Exported language models compute the same elsewhere, and come back."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from console import evaluate, evaluated, evaluation_record
from exported_models import MODELS, WORDS, export, logits_of, write_model
from fairseq.data import Dictionary
from language_models import small_dictionary, token_rows
from safetensors.torch import load_file, save_file
from trained_model import TrainedModel

from mhmoe_fairseq.checkpoints.files import read_trained
from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.files import sha256_of
from mhmoe_fairseq.evaluation.records import Metric, Record, write_record

pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
PROBE = Path(__file__).parents[1] / "support" / "transformers_probe.py"
PADDED = token_rows([14, 14], words=WORDS)
PADDED[1, 7:] = Dictionary().pad()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For every model what this package computes and what one process without it does."""
    pytest.importorskip("transformers", reason="needs pip install transformers", minversion="5.10")
    root, found = tmp_path_factory.mktemp("models"), {}
    ids = token_rows([14, 14], words=WORDS)
    for name, (arch, flags) in MODELS.items():
        checkpoint, out = write_model(root / name, arch, **flags), root / name / "exported"
        assert export(checkpoint, out) == 0
        torch.save({"ids": ids}, out / "probe.pt")
        found[name] = {"ours": logits_of(checkpoint, ids), "folder": out}
    if importlib.util.find_spec("accelerate"):
        (found["mhmoe"]["folder"] / "train").touch()
    (found["mhmoe"]["folder"] / "damage").touch()
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    folders = [str(entry["folder"]) for entry in found.values()]
    subprocess.run([sys.executable, str(PROBE), *folders], env=environment, check=True)
    return {name: {**entry, **torch.load(entry["folder"] / "found.pt")} for name, entry in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_logits_elsewhere_are_ours(opened: dict[str, dict[str, Any]], name: str) -> None:
    found = opened[name]
    torch.testing.assert_close(found["logits"], found["ours"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_there_gives_the_same(opened: dict[str, dict[str, Any]], name: str) -> None:
    found = opened[name]
    ways = ("experts", "attention", "steps", "left padding")
    differences = {key: value for key, value in found.items() if key.startswith(ways)}
    assert len(differences) == 10 and max(differences.values()) < 2e-5, differences
    assert found["generated without cache"] and found["generated padded"] and found["beams"]
    assert found["saved again"] and found["files"] > 1
    assert found["without gradient"] == []
    assert found["cache twice"].startswith("gradient checkpointing computes layers twice")


@pytest.mark.parametrize("name", ["mhmoe", "smoe"])
def test_engines_find_no_names_under_which_they_replace_experts(tmp_path: Path, name: str) -> None:
    """vLLM makes experts as wide as the model of what stands under these, and of a child called so."""
    arch, flags = MODELS[name]
    assert export(write_model(tmp_path / "run", arch, **flags), tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"} & config.keys()
    assert config["mhmoe_experts"] == 8


def test_balance_loss_is_ours_and_is_added_with_its_weight(opened: dict[str, dict[str, Any]]) -> None:
    """The mean of the layers' over real tokens, padding apart."""
    for name in ("mhmoe", "smoe", "groups", "banks", "deepnorm", "remoe", "remoe heads"):
        found = opened[name]
        model = open_model(found["folder"].parent / "model.pt", found["folder"].parent, "cpu").model
        for key, ids in (("balance", token_rows([14, 14], words=WORDS)), ("balance of padded", PADDED)):
            with torch.no_grad():
                extra = model(ids)[1]
            losses = [output.balance_loss for output in extra["moe"] if output is not None]
            assert found[key] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert found["with balance"] == pytest.approx(found["loss"] + 0.01 * found["balance"], rel=1e-6)


def test_trainer_takes_a_step(opened: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    found = opened["mhmoe"]
    assert 0 < found["trained loss"] < 20 and found["moved"] > 30


def test_damaged_folders_are_refused_elsewhere(opened: dict[str, dict[str, Any]]) -> None:
    """An impossible value by its field and rule; what the weights contradict, and half of them, by transformers."""
    found = {**opened["mhmoe"]["refusals"]}
    mismatch, shard = found.pop("mhmoe_expert_size"), found.pop("shard")
    assert "mismatch" in mismatch and shard.startswith("SafetensorError"), (mismatch, shard)
    for name, message in found.items():
        assert f"config.json: {name} (" in message and "must be" in message, message


@pytest.mark.parametrize("name", MODELS)
def test_saved_by_transformers_comes_back(opened: dict[str, dict[str, Any]], tmp_path: Path, name: str) -> None:
    again, back = opened[name]["folder"] / "again", tmp_path / "back"
    shutil.copyfile(again.parent / "dict.txt", again / "dict.txt")
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(again), str(back)]) == 0
    logits = logits_of(back / "model.pt", token_rows([14, 14], words=WORDS))
    torch.testing.assert_close(logits, opened[name]["ours"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Weights are the same bit by bit, and with them results; but for experts with a norm inside, to rounding."""
    arch, flags = MODELS[name]
    task = {"sample_break_mode": "eos", "add_bos_token": True}
    checkpoint = write_model(tmp_path / "one", arch, task, **flags)
    shards = ("--max-shard-size", "0.00002")
    assert export(checkpoint, tmp_path / "hf", *shards) == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    back = tmp_path / "back"
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(tmp_path / "hf"), str(back)]) == 0
    before, after = (read_trained(folder / "model.pt") for folder in (checkpoint.parent, back))
    folded = ".experts.fc2_", ".experts.layernorm_"
    assert before["model"].keys() == after["model"].keys()
    has_norm = any("experts.layernorm" in weight for weight in before["model"])
    for weight, value in before["model"].items():
        if not (has_norm and any(part in weight for part in folded)):
            assert torch.equal(value, after["model"][weight]), weight
    given = {key: value for key, value in before["cfg"]["model"].items() if value is not None}
    assert given == {key: value for key, value in after["cfg"]["model"].items() if value is not None}
    kept = after["cfg"]["task"]
    assert {key: kept[key] for key in task} == task
    ids = token_rows([20, 20], words=WORDS)
    least = 1e-5 * has_norm
    torch.testing.assert_close(logits_of(back / "model.pt", ids), logits_of(checkpoint, ids), rtol=least, atol=least)


@pytest.mark.parametrize(
    "flags, bias",
    [
        ({"no_bias": True}, "up_proj_bias"),
        ({"no_bias": True, "activation_fn": "silu", "moe_ffn_dim": 4}, "down_proj_bias"),
    ],
)
def test_biases_that_were_trained_elsewhere_and_have_no_place_here_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], bias: str
) -> None:
    """Of experts with a norm and no biases: up_proj_bias has none; down_proj_bias only what the norm's shift can be."""
    folder = tmp_path / "hf"
    assert export(write_model(tmp_path / "run", "mhmoe_lm_tiny", subln=True, **flags), folder) == 0
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(f"experts.{bias}"))
    weights[name] += 0.1 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = refusal(capsys, "--format", "fairseq", folder, tmp_path / "back")
    assert f"{bias} was trained, but experts of --no-bias have no such bias" in line


def test_what_a_training_elsewhere_may_choose_anew_comes_back(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "run", "mhmoe_lm_tiny", moe_freq=1)
    stored = torch.load(checkpoint, weights_only=True)
    stored["cfg"]["criterion"] |= {"moe_gate_loss_wt": 0.02, "moe_gate_loss_combine_method": "sum"}
    torch.save(stored, checkpoint)
    assert export(checkpoint, tmp_path / "hf") == 0
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    assert config["mhmoe_balance_weight"] == pytest.approx(2 * 0.02)  # of the mean over two layers
    changes = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1, "mhmoe_balance": "topk"}
    file.write_text(json.dumps({**config, **changes, "mhmoe_balance_scope": "sequence"}))
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(file.parent), str(tmp_path / "back")]) == 0
    criterion = read_trained(tmp_path / "back" / "model.pt")["cfg"]["criterion"]
    assert criterion == {"_name": "moe_cross_entropy", "moe_gate_loss_wt": pytest.approx(0.04)}


@pytest.mark.parametrize(
    "symbols, rule",
    [
        (["\u2581the", "\u2581river", "s"], "no sentencepiece.model in it, of whose pieces its dict.txt is"),
        (list(map(str, range(300))), "no ranks.tiktoken in it, of whose tokens its dict.txt is"),
    ],
)
def test_pieces_of_a_vocabulary_are_not_taken_for_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], symbols: list[str], rule: str
) -> None:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    checkpoint = write_model(tmp_path / "run", "dense_lm_tiny", dictionary=dictionary)
    assert rule in refusal(capsys, "--format", "hf", checkpoint, tmp_path / "hf")


def test_the_vocabulary_is_asked_for_on_the_way_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    assert export(write_model(tmp_path / "run", "dense_lm_tiny"), folder) == 0
    file = folder / "dict.txt"
    file.write_text(file.read_text().replace("w7 ", "\u2581w7 "))
    assert "no sentencepiece.model in it" in refusal(capsys, "--format", "fairseq", folder, tmp_path / "back")


def test_perplexity_there_and_back(trained_model: TrainedModel, tmp_path: Path) -> None:
    """Of a trained model whose experts have a norm: what fairseq-eval-lm prints, and the record to rounding."""
    back, printed, records = tmp_path / "back", [], []
    assert export(trained_model.checkpoint, tmp_path / "hf") == 0
    assert str(trained_model.folder.parent) not in (tmp_path / "hf" / "config.json").read_text(encoding="utf-8")
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(tmp_path / "hf"), str(back)]) == 0
    for checkpoint in (trained_model.checkpoint, back / "model.pt"):
        printed.append(evaluated(evaluate(trained_model.data, checkpoint)))
        record = evaluation_record(tmp_path, checkpoint, "--data", trained_model.data, "--split", "test")
        records.append({name: metric.value for name, metric in record.metrics.items()})
    assert printed[0] == printed[1] and printed[0].perplexity > 2
    assert records[1] == pytest.approx(records[0], rel=1e-6)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of ``mhmoe checkpoint export``, which wrote nothing."""
    out = Path(str(words[-1]))
    before = sorted(out.iterdir()) if out.is_dir() else None
    capsys.readouterr()
    assert mhmoe(["checkpoint", "export", *map(str, words)]) != 0
    assert (sorted(out.iterdir()) if out.is_dir() else None) == before
    assert not list(out.parent.glob(f".{out.name}*"))
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = write_model(tmp_path / "good", "mhmoe_lm_tiny"), tmp_path / "out"
    capacity = write_model(tmp_path / "capacity", "smoe_lm_tiny", mhmoe_routing="capacity")
    assert "--mhmoe-routing capacity cannot be exported" in refusal(capsys, "--format", "hf", capacity, out)
    balanced = write_model(tmp_path / "balanced", "smoe_lm_tiny", mhmoe_router="balanced-for-benchmarks")
    assert "--mhmoe-router balanced-for-benchmarks cannot be exp" in refusal(capsys, "--format", "hf", balanced, out)
    ternary = write_model(tmp_path / "ternary", "mhmoe_lm_tiny", mhmoe_quantize="all")
    assert "--mhmoe-quantize (all): 1.58-bit models are not exp" in refusal(capsys, "--format", "hf", ternary, out)
    assert "--format" in refusal(capsys, "--format", "gguf", good, out)
    assert "not an empty folder" in refusal(capsys, "--format", "hf", good, tmp_path / "good")
    (tmp_path / "other").mkdir()
    small_dictionary(WORDS + 1).save(str(tmp_path / "other" / "dict.txt"))
    renamed = (tmp_path / "good" / "dict.txt").read_text(encoding="utf-8").replace("w7 ", "other ")
    for content in (None, renamed):  # too many words, another word
        if content is not None:
            (tmp_path / "other" / "dict.txt").write_text(content, encoding="utf-8")
        words = "--data", tmp_path / "other", good, out
        assert "is not the checkpoint's dictionary" in refusal(capsys, "--format", "hf", *words)
    (tmp_path / "good" / "dict.txt").unlink()
    assert "no dict.txt" in refusal(capsys, "--format", "hf", good, out)


def test_damaged_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, folder, out = write_model(tmp_path / "good", "mhmoe_lm_tiny"), tmp_path / "hf", tmp_path / "out"
    assert export(checkpoint, folder, "--max-shard-size", "0.00002") == 0
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    config = folder / "config.json"
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    text = whole[config].decode()
    damages = [
        (config, text.replace('"mhmoe_top_k": 2', '"mhmoe_top_k": 3'), "mhmoe_top_k (3) contradicts"),
        (config, text.replace('"mhmoe_lm"', '"llama"'), "model_type must be mhmoe_lm"),
        (config, text.replace('"fairseq"', '"nothing"'), "no fairseq settings"),
        (config, text.replace('"decoder_attention_heads": 2', '"decoder_attention_heads": 7'), "must divide"),
        (config, "{", "not valid JSON"),
        (shard, whole[shard][: len(whole[shard]) // 2], f"{shard.name}: no readable weights"),
        (shard, None, f"no {shard.name} in it"),
        (folder / "dict.txt", None, "no dict.txt"),
        (config, None, "no config.json"),
    ]
    for path, content, message in damages:
        path.unlink()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert message in refusal(capsys, "--format", "fairseq", folder, out), message
        path.write_bytes(whole[path])
    for flag, value in (("--data", tmp_path / "good"), ("--max-shard-size", 2)):
        assert f"{flag} has no meaning" in refusal(capsys, "--format", "fairseq", flag, value, folder, out)
    assert mhmoe(["checkpoint", "export", "--format", "fairseq", str(folder), str(out)]) == 0


def test_the_card_tells_records_and_data(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "run", "mhmoe_lm_tiny")
    digest = "0123456789abcdef"
    for split, value, of in (("test", 12.345, sha256_of(checkpoint)), ("valid", 99.0, "another checkpoint's")):
        metrics, about = {"perplexity": Metric(value, "perplexity")}, {"data": {"digest": digest * 4}}
        record = Record("perplexity", split, metrics, checkpoint={"sha256": of}, **about)
        write_record(tmp_path / "run" / f"record-{split}.json", record)
    assert export(checkpoint, tmp_path / "hf") == 0
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "8 experts, 2 for each of a token's 4 sub-tokens" in card and "add_bos_token=False" in card
    (row,) = card.split("\n| perplexity")[1:]
    cells = row.split("|")[1:5]
    assert [cell.strip() for cell in cells] == ["12.35", "perplexity", "test", digest]


def test_without_tokenizers_the_line_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = refusal(capsys, "--format", "hf", write_model(tmp_path / "run", "dense_lm_tiny"), tmp_path / "hf")
    assert "pip install 'mhmoe_fairseq[hf]'" in line

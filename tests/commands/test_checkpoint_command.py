"""``mhmoe checkpoint`` on a really trained model: what it says, and that fairseq opens what it writes."""

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from beit3_models import small_beit3
from console import evaluate, logged, train
from language_models import small_model
from safetensors.torch import save_file
from trained_model import TrainedModel

from mhmoe_fairseq.checkpoints.summary import summarize
from mhmoe_fairseq.commands.main import main


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def mhmoe_checkpoint(*words: object) -> None:
    assert main(["checkpoint", *map(str, words)]) == 0


def perplexity(log: str) -> str:
    return re.search(r"Perplexity: ([\d.]+)", log)[1]


@pytest.fixture(scope="module")
def converted(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint, to safetensors and back."""
    folder = tmp_path_factory.mktemp("converted")
    mhmoe_checkpoint("convert", trained_model.checkpoint, folder / "model.safetensors")
    mhmoe_checkpoint("convert", folder / "model.safetensors", folder / "checkpoint_last.pt")
    return folder / "checkpoint_last.pt"


@pytest.fixture
def variants(trained_model: TrainedModel, tmp_path: Path) -> list[Path]:
    """Three checkpoints of one model that differ by a little, named as fairseq names those of epochs and updates."""
    folder = tmp_path / "variants"
    folder.mkdir()
    for number in (1, 2, 10):
        checkpoint = load(trained_model.checkpoint)
        for name, value in checkpoint["model"].items():
            if value.is_floating_point() and name != "decoder.output_projection.weight":  # tied to the embedding
                value.add_(number / 1000)
        torch.save(checkpoint, folder / f"checkpoint{number}.pt")
    shutil.copy(folder / "checkpoint1.pt", folder / "checkpoint_1_30.pt")
    shutil.copy(folder / "checkpoint2.pt", folder / "checkpoint_2_60.pt")
    return [folder / f"checkpoint{number}.pt" for number in (1, 2, 10)]


def test_inspect_tells_what_a_trained_checkpoint_holds(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mhmoe_checkpoint("inspect", trained_model.checkpoint, "--json", tmp_path / "a.json")
    text = capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "a.json").read_text())
    checkpoint = load(trained_model.checkpoint)
    weights = {name: value for name, value in checkpoint["model"].items() if value.is_floating_point()}
    del weights["decoder.output_projection.weight"]
    expert = sum(value.numel() for name, value in weights.items() if ".experts." in name)
    assert figures["parameters"]["experts"] == expert
    assert figures["total"] == sum(value.numel() for value in weights.values())
    assert figures["parameters"]["text embedding"] == weights["decoder.embed_tokens.weight"].numel()
    assert figures["optimizer_bytes"] == 2 * 4 * figures["total"] and figures["complete"]
    assert (figures["arch"], figures["updates"], figures["optimizer"]) == ("mhmoe_lm_tiny", 60, "FairseqAdam")
    assert figures["experts"] == {"decoder.layers.1.moe_layer": 8}
    symbols = [line.split(" ")[0] for line in (trained_model.data / "dict.txt").read_text().splitlines()]
    expected = hashlib.sha256("\n".join(["<s>", "<pad>", "</s>", "<unk>", *symbols]).encode()).hexdigest()
    assert figures["fingerprint"] == expected and expected in text
    assert "60 updates" in text and "8 in each of 1 MoE layers" in text and figures["corpus"] in text


def test_a_converted_checkpoint_says_the_same(
    trained_model: TrainedModel, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [trained_model.checkpoint, converted, converted.with_name("model.safetensors")]
    mhmoe_checkpoint("inspect", *files, "--json", tmp_path / "a.json")
    original, *others = json.loads((tmp_path / "a.json").read_text())
    for other in others:
        assert {**other, "path": None, "file_bytes": None} == {**original, "path": None, "file_bytes": None}
    assert capsys.readouterr().out.count("mhmoe_lm_tiny") == 3


def test_fairseq_evaluates_what_was_converted_back_to_the_same_perplexity(
    trained_model: TrainedModel, converted: Path
) -> None:
    flags = ["--sample-break-mode", "eos"]
    ours = perplexity(evaluate(trained_model.data, converted, *flags))
    assert ours == perplexity(evaluate(trained_model.data, trained_model.checkpoint, *flags))


def test_training_resumes_from_what_was_converted_back_as_from_the_original(
    trained_model: TrainedModel, converted: Path, tmp_path: Path
) -> None:
    flags = "--sample-break-mode eos --tokens-per-sample 64 --batch-size 16 --decoder-embed-dim 64 --lr 0.005".split()
    figures = []
    for source in (trained_model.checkpoint, converted):
        saved = tmp_path / str(len(figures))
        saved.mkdir()
        shutil.copy(source, saved / "checkpoint_last.pt")
        log = train(trained_model.data, saved, "mhmoe_lm_tiny", *flags, "--log-interval", 1, max_update=64)
        assert "@ 60 updates" in log
        figures.append({key: logged(log, "valid")[key] for key in ("loss", "gate_loss", "num_updates")})
        figures[-1]["gnorm"] = re.findall(r"gnorm ([\d.]+)", log)
    assert figures[0] == figures[1] and figures[0]["num_updates"] == 64


def test_weights_only_drops_the_optimizer_state_and_says_so(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mhmoe_checkpoint("convert", trained_model.checkpoint, tmp_path / "a.safetensors", "--weights-only")
    assert "optimizer state: left out; a training cannot resume" in capsys.readouterr().out
    assert (tmp_path / "a.safetensors").stat().st_size < 0.4 * trained_model.checkpoint.stat().st_size
    mhmoe_checkpoint("convert", tmp_path / "a.safetensors", tmp_path / "a.pt")
    assert "optimizer state: not in the source" in capsys.readouterr().out
    assert "Perplexity" in evaluate(trained_model.data, tmp_path / "a.pt", "--sample-break-mode", "eos")


def test_the_average_is_the_mean_and_opens_in_fairseq(
    trained_model: TrainedModel, variants: list[Path], tmp_path: Path
) -> None:
    mhmoe_checkpoint("average", "--inputs", *variants, "--output", tmp_path / "mean.pt")
    mean, states = load(tmp_path / "mean.pt"), [load(path)["model"] for path in variants]
    for name, value in mean["model"].items():
        expected = sum(state[name].double() for state in states) / 3 if value.is_floating_point() else states[0][name]
        assert torch.equal(value, expected.to(value.dtype)), name
    assert mean["model"]["decoder.output_projection.weight"].data_ptr() == (
        mean["model"]["decoder.embed_tokens.weight"].data_ptr()
    )
    assert "last_optimizer_state" not in mean
    assert "Perplexity" in evaluate(trained_model.data, tmp_path / "mean.pt", "--sample-break-mode", "eos")


@pytest.mark.parametrize(
    "flags, chosen",
    [
        (["--num-epoch-checkpoints", 2], ["checkpoint2.pt", "checkpoint10.pt"]),
        (["--num-epoch-checkpoints", 2, "--checkpoint-upper-bound", 9], ["checkpoint1.pt", "checkpoint2.pt"]),
        (["--num-update-checkpoints", 1], ["checkpoint_2_60.pt"]),
        (["--num-update-checkpoints", 1, "--checkpoint-upper-bound", 30], ["checkpoint_1_30.pt"]),
    ],
)
def test_the_newest_checkpoints_of_a_folder_are_averaged(
    variants: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture, flags: list, chosen: list[str]
) -> None:
    mhmoe_checkpoint("average", "--inputs", variants[0].parent, *flags, "--output", tmp_path / "mean.safetensors")
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()[1:]] == chosen


def damage(path: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another setting, tensor or entry; the copy's path."""
    checkpoint = load(path)
    for name, value in changes.items():
        if name == "fingerprint":
            checkpoint["model"]["decoder.vocabulary_fingerprint"] = torch.tensor(value)
        elif name == "classes":
            checkpoint["task_state"] = {"classes": value}
        elif name in checkpoint["cfg"]["model"]:
            checkpoint["cfg"]["model"][name] = value
        else:
            checkpoint["model"][name] = value
    torch.save(checkpoint, path.with_name("damaged.pt"))
    return path.with_name("damaged.pt")


@pytest.mark.parametrize(
    "arch, flags",
    [
        ("mhmoe_lm_tiny", {"mhmoe_router_preset": "p1"}),  # its temperature has no dimension
        ("mhmoe_lm_tiny", {"mhmoe_balancing": "bias-sign", "mhmoe_expert_banks": "per-head"}),
        ("remoe_lm_tiny", {}),
        ("dense_lm_tiny", {"xpos_rel_pos": True}),
    ],
)
def test_what_has_no_gradient_is_no_parameter(tmp_path: Path, arch: str, flags: dict) -> None:
    model = small_model(arch, **flags)
    optimizer = torch.optim.Adam(model.parameters())
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    state = {"model": model.state_dict(), "last_optimizer_state": optimizer.state_dict()}
    torch.save(state, tmp_path / "a.pt")
    summary = summarize(tmp_path / "a.pt", load(tmp_path / "a.pt"))
    assert summary.total == sum(value.numel() for value in model.parameters()) and summary.complete
    del state["last_optimizer_state"]["state"][0]["exp_avg"]
    assert not summarize(tmp_path / "a.pt", state).complete


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fingerprint": [1, 2, 3, 4]}, "it has another dictionary"),
        ({"moe_top_k": 1}, "--moe-top-k is 1 in it, 2 there"),
        ({"decoder.layer_norm.bias": torch.zeros(3)}, r"decoder.layer_norm.bias is \(3,\) in it, \(64,\) there"),
        ({"classes": ["dog", "cat"]}, r"damaged.pt has other classes, or in another order, than .*: \['dog', 'cat'\]"),
        ({"decoder.more": torch.zeros(3)}, r"decoder.more is \(3,\) in it, missing there"),
        ({"decoder.layer_norm.bias": torch.full((64,), float("nan"))}, "damaged.pt: .* are not finite"),
    ],
    ids=["dictionary", "setting", "shape", "classes", "name", "nan"],
)
def test_checkpoints_of_different_models_are_not_averaged(
    variants: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, message: str
) -> None:
    other = damage(variants[0], **changes)
    output = tmp_path / "mean.pt"
    assert main(["checkpoint", "average", "--inputs", str(variants[0]), str(other), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not output.exists()


def test_counters_of_one_run_differ_and_the_last_files_is_kept(variants: list[Path], tmp_path: Path) -> None:
    for number, path in enumerate(variants[:2], start=3):
        checkpoint = load(path)
        checkpoint["model"]["head.norm.num_batches"] = torch.tensor(number)
        torch.save(checkpoint, path)
    mhmoe_checkpoint("average", "--inputs", *variants[:2], "--output", tmp_path / "mean.pt")
    assert load(tmp_path / "mean.pt")["model"]["head.norm.num_batches"].item() == 4


@pytest.mark.parametrize("content", [{"model": {}, "cfg": {}}, {"cfg": {}}, {"model": {"w": 1}, "cfg": {}}, [1], None])
def test_a_good_file_is_not_replaced_by_one_without_weights(tmp_path: Path, content: object) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.pt"
    save_file({"w": torch.ones(1)}, good)
    before = good.read_bytes()
    torch.save(content, bad)
    if content is None:
        bad.write_bytes(b"nothing")
    assert main(["checkpoint", "convert", str(bad), str(good), "--overwrite"]) == 2
    assert main(["checkpoint", "average", "--inputs", str(bad), "--output", str(good), "--overwrite"]) == 2
    assert good.read_bytes() == before and sorted(tmp_path.iterdir()) == [bad, good]


def test_another_dropout_is_no_other_model(variants: list[Path], tmp_path: Path) -> None:
    other = damage(variants[0], dropout=0.3)
    mhmoe_checkpoint("average", "--inputs", variants[0], other, "--output", tmp_path / "mean.pt")
    assert torch.equal(load(tmp_path / "mean.pt")["model"]["decoder.layer_norm.bias"],
                       load(variants[0])["model"]["decoder.layer_norm.bias"])  # fmt: skip


@pytest.mark.parametrize(
    "words, message",
    [
        (["convert", "LAST", "no.pt"], "one must be a .pt, the other a .safetensors"),
        (["convert", "gone.pt", "a.safetensors"], r"FROM \(gone.pt\) does not exist"),
        (["convert", "FOREIGN", "a.pt"], "no configuration of fairseq"),
        (
            ["average", "--inputs", "FOREIGN", "FOREIGN", "--output", "a.pt"],
            "foreign.safetensors has no configuration of fairseq",
        ),
        (["average", "--inputs", "FOLDER", "--output", "a.pt"], "is a folder: give --num-epoch-checkpoints"),
        (["average", "--inputs", "FOLDER", "--num-epoch-checkpoints", "0", "--output", "a.pt"], "must be at least 1"),
        (["average", "--inputs", "FOLDER", "--num-epoch-checkpoints", "3", "--output", "a.pt"], "has only 0 such"),
        (["average", "--inputs", "LAST", "--num-epoch-checkpoints", "3", "--output", "a.pt"], "to be one folder"),
        (["average", "--inputs", "LAST", "--checkpoint-upper-bound", "3", "--output", "a.pt"], "needs --num-epoch"),
        (["average", "--inputs", "LAST", "--output", "LAST"], "exists: give --overwrite"),
        (["inspect", "DICT"], "dict.txt: no readable checkpoint .it is not a file of torch.save"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "foreign.safetensors")
    named = {"LAST": trained_model.checkpoint, "FOLDER": trained_model.folder, "FOREIGN": "foreign.safetensors",
             "DICT": trained_model.data / "dict.txt"}  # fmt: skip
    assert main(["checkpoint", *(str(named.get(word, word)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.safetensors"]


@pytest.mark.parametrize("action", ["inspect", "convert", "average"])
def test_help_teaches_by_examples(action: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", action, "--help"])
    assert end.value.code == 0
    assert f"mhmoe checkpoint {action} " in capsys.readouterr().out.partition("options:")[0].partition("\n\n")[2]


def test_inspect_tells_what_a_checkpoint_of_images_and_texts_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = small_beit3(mhmoe_modality_experts="separate")
    model.register_head("answers", torch.nn.Linear(32, 3))
    settings = {"_name": "mhmoe_beit3_tiny", "encoder_layers": 2, "img_size": 8, "mhmoe_modality_experts": "separate"}
    path = tmp_path / "checkpoint_best.pt"
    torch.save({"model": model.state_dict(), "cfg": {"model": settings}}, path)
    mhmoe_checkpoint("inspect", path, "--json", tmp_path / "a.json")
    text = capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "a.json").read_text())
    assert figures["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters"]["task heads"] == 32 * 3 + 3
    assert "other" not in figures["parameters"]
    assert figures["fingerprint"] == struct.pack("<4q", *model.vocabulary_fingerprint.tolist()).hex()
    assert "8 in each of 2 pools, two in each MoE layer" in text
    assert "encoder_layers 2, img_size 8, mhmoe_modality_experts separate" in text

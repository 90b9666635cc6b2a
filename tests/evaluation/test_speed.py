"""``mhmoe evaluate --speed``: what is timed are greedy continuations, tokens are counted by hand, models take turns."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from language_models import small_dictionary

from mhmoe_fairseq.checkpoints.open import open_model
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.identity import identify_data
from mhmoe_fairseq.evaluation import speed
from mhmoe_fairseq.evaluation.generation import Search, continue_prompts
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.evaluation.speed import Timing, Workload, continue_greedily, measure_speed
from mhmoe_fairseq.models.language_model import MHMoELanguageModel


def test_the_timed_tokens_are_those_of_mhmoe_generate(trained_model) -> None:
    hub = MHMoELanguageModel.from_pretrained(str(trained_model.folder))
    eos, pad = hub.tgt_dict.eos(), hub.tgt_dict.pad()
    for prompt in ("The river", "The captain mends the garden near"):
        [found] = continue_prompts(hub, [prompt], Search(max_len_b=60))
        given = torch.cat([torch.tensor([eos]), hub.encode(prompt)[:-1]])
        expected = [hub.tgt_dict.index(word) for word in found.tokens[len(given) - 1 :]]
        tokens, _ = continue_greedily(hub.models[0].decoder, given[None], 40, pad)
        assert len(expected) > 3 and tokens[0].tolist()[: len(expected)] == expected[:40]


def test_every_row_goes_on_as_whole_passes_say_and_the_first_step_has_its_own_time(trained_model) -> None:
    opened = open_model(trained_model.folder, trained_model.data, "cpu")
    dictionary, workload = opened.task.source_dictionary, Workload.parse("3x5+30")
    prompts, steps = workload.prompts(dictionary), []
    assert prompts.shape == (3, 5) and (prompts[:, 0] == dictionary.eos()).all()
    assert prompts[:, 1:].min() >= dictionary.nspecial and torch.equal(prompts, workload.prompts(dictionary))
    opened.model.decoder.register_forward_hook(lambda *given: steps.append(given))
    tokens, timing = continue_greedily(opened.model.decoder, prompts, 30, dictionary.pad(), lambda: len(steps))
    assert timing == Timing(1, 29)
    with torch.no_grad():
        logits = opened.model(torch.cat([prompts, tokens], 1))[0]
    logits[..., dictionary.pad()] = -torch.inf
    assert torch.equal(tokens, logits[:, 4:-1].argmax(-1))
    assert (tokens == dictionary.eos()).any()  # a row goes on after its end


def test_padding_is_never_chosen() -> None:
    class Decoder(torch.nn.Module):
        def forward(self, tokens, **_):
            return torch.zeros(len(tokens), 1, 4), {}

        def output_layer(self, features):
            return torch.tensor([[-3.0, 5.0, -1.0, -2.0]]).expand(len(features), 4).clone()

        def autocast(self, _):
            return torch.no_grad()

    tokens, timing = continue_greedily(Decoder(), torch.zeros(2, 3, dtype=torch.long), 1, 1)
    assert tokens.tolist() == [[2], [2]] and timing.steps >= 0


def test_rates_are_of_the_tokens_counted_by_hand() -> None:
    rates = Timing(prompt=0.5, steps=1.5).rates(Workload(batch=4, prompt=7, new=16))
    assert rates == {"output tokens/s": 64 / 2, "input tokens/s": 28 / 2, "prompt tokens/s": 28 / 0.5}


def test_models_take_turns_and_records_have_medians_of_the_timed_rounds(trained_model, monkeypatch) -> None:
    opened = [open_model(trained_model.folder, trained_model.data, "cpu") for _ in range(3)]
    decoders, order = [each.model.decoder for each in opened], []
    times = [iter(prompt) for prompt in ([9.0, 1.0, 3.0, 2.0], [9.0, 4.0, 4.0, 8.0], [9.0, 1.0, 1.0, 1.0])]

    def timed(decoder, prompts, new, pad, clock):
        assert (prompts.shape, new) == ((2, 3), 5)
        order.append(decoders.index(decoder))
        return None, Timing(next(times[order[-1]]), 0.0)

    monkeypatch.setattr(speed, "continue_greedily", timed)
    first, second, _ = measure_speed(opened, Workload(2, 3, 5), rounds=3)
    assert order == [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert {name: (metric.value, metric.count) for name, metric in first.metrics.items()} == {
        "output tokens/s": (5.0, 10), "input tokens/s": (3.0, 6), "prompt tokens/s": (3.0, 6),
    }  # fmt: skip
    assert second.main.value == 10 / 4 and second.settings["by_round"]["output tokens/s"] == [2.5, 2.5, 1.25]
    assert (first.what, first.split, first.main.unit) == ("speed", "2x3+5", "tokens/s")


def test_a_record_of_each_checkpoint_and_workload(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [runs.copy(name, tmp_path / name) for name in ("dense", "mhmoe")]
    assert main(["evaluate", *map(str, folders), "--speed", "2x3+4", "1x1+1", "--rounds", "2", "--cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("written: ") == 4 and shown.count("| checkpoint ") == 2 and "medians of 2 rounds" in shown
    for folder, workload in itertools.product(folders, ("2x3+4", "1x1+1")):
        record = read_record(folder / f"record-speed-{workload}.json")
        assert (record.what, record.split, record.main.count) == (
            "speed",
            workload,
            int(workload[0]) * int(workload[-1]),
        )
        assert record.settings["models_by_turns"] == 2 and record.settings["threads"] == torch.get_num_threads()
        assert record.data["digest"] == identify_data(runs.data).digest and record.experts is None
        assert record.checkpoint["updates"] == 8 and record.provenance["precision"] == "fp32"
    one = [str(folders[0]), "--speed", "1x1+1", "--rounds", "1", "--precision", "bf16", "--record"]
    assert main(["evaluate", *one, str(tmp_path / "here.json"), "--cpu"]) == 0
    assert read_record(tmp_path / "here.json").provenance["precision"] == "bf16"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--speed", "4x7"], r"--speed (4x7) must be BATCHxPROMPT+NEW, three whole numbers from 1, such as 4x7+16"),
        (["--speed", "0x7+1"], "--speed (0x7+1) must be"),
        (["--speed", "1x1+1", "1x10+23"], "--speed (1x10+23): 33 tokens must be at most 32, "),
        (["--speed", "1x1+1", "--split", "valid"], "--split: has no meaning with --speed"),
        (["--speed", "1x1+1", "1x1+2", "--record", "r.json"], "--record: takes one checkpoint and one workload, not 2"),
        (["OTHER", "--speed", "1x1+1"], "checkpoints of one folder would share a record"),
        (["OTHER"], "several checkpoints: need --speed"),
        (["--vllm", sys.executable], "--vllm: need --speed"),
        (["--rounds", "3"], "--rounds: need --speed"),
    ],
)
def test_bad_calls_are_one_line(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    run = runs.copy("dense", tmp_path / "dense")
    words = [str(run / "checkpoint_last.pt") if word == "OTHER" else word for word in words]
    assert main(["evaluate", str(run / "checkpoint_best.pt"), *words, "--cpu"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line and not list(run.glob("record-*.json"))


def test_only_language_models_with_one_dictionary_are_compared(trained_model, monkeypatch) -> None:
    settings = {"model": {"encoder_layers": 2}, "task": {"_name": "mhmoe_masked_multimodal", "data": "images"}}
    monkeypatch.setattr(speed, "read_settings", lambda file: settings)
    with pytest.raises(ValueError, match=r"beit3.pt was trained with task mhmoe_masked_multimodal and must be a lang"):
        speed.require_language_models([Path("beit3.pt")])
    opened = open_model(trained_model.folder, trained_model.data, "cpu")
    task = SimpleNamespace(source_dictionary=small_dictionary())
    other = SimpleNamespace(model=opened.model, task=task, file=Path("other.pt"))
    with pytest.raises(ValueError, match="other.pt and .* must have one dictionary"):
        measure_speed([opened, other], Workload(1, 1, 1))


_ENGINE = """
import json, pathlib, sys
__version__ = "1.2.3"
LOG = pathlib.Path(__file__).with_name("log")

class SamplingParams:
    def __init__(self, **given):
        assert given["ignore_eos"] and given["temperature"] == 0
        self.max_tokens = given["max_tokens"]

class LLM:
    def __init__(self, folder, **given):
        assert not given["enable_prefix_caching"]
        assert given["dtype"] == "float32" and given["max_model_len"] == 7
        self.arch = json.loads(pathlib.Path(folder, "config.json").read_text())["fairseq"]["model"]["_name"]

    def generate(self, prompts, sampling, use_tqdm):
        with LOG.open("a") as log:
            lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
            print(json.dumps([self.arch, lengths, sampling.max_tokens]), file=log)
        output = type("Output", (), {"outputs": [type("One", (), {"token_ids": [4] * sampling.max_tokens})]})
        return [output] * len(prompts)
"""


def test_exported_models_take_turns_in_vllm(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
    folders = [runs.copy(name, tmp_path / name) for name in ("dense", "mhmoe")]
    (tmp_path / "vllm.py").write_text(_ENGINE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    words = ["--speed", "2x3+4", "1x1+1", "--rounds", "2", "--cpu", "--vllm", str(python)]
    call = ["evaluate", *map(str, folders), *words]
    assert main(call) == 0
    assert "workload vllm-2x3+4: medians of 2 rounds" in capsys.readouterr().out
    dense, mhmoe = ([f"{name}_lm_tiny", [3, 3], 4] for name in ("dense", "mhmoe"))
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert log[2:6] == [dense, mhmoe, mhmoe, dense] and sorted(log[:2]) == [dense, mhmoe] and len(log) == 12
    record = read_record(folders[1] / "record-speed-vllm-2x3+4.json")
    rounds = record.settings["by_round"]
    assert record.split == "vllm-2x3+4" and record.settings["engine"] == "vLLM 1.2.3, float32"
    assert rounds["input tokens/s"] == pytest.approx([6 / 8 * rate for rate in rounds["output tokens/s"]])
    (tmp_path / "vllm.py").write_text("raise OSError('no such engine')")
    assert main(call) == 2
    assert f"--vllm ({python}) failed: OSError: no such engine" in capsys.readouterr().err

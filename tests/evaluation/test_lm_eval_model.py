"""The adapter through lm-eval's own requests and its own command line, offline."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import direct_scores, line_ids

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.commands.zero_shot import complete
from mhmoe_fairseq.evaluation.generation import Search, continue_prompts
from mhmoe_fairseq.evaluation.records import read_record

pytest.importorskip("lm_eval", reason="lm-eval is an optional package")

from lm_eval.api.registry import get_model  # noqa: E402

from mhmoe_fairseq.evaluation.lm_eval_model import MHMoEHarnessModel, read_generation_arguments  # noqa: E402


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def lm(trained_model):
    return MHMoEHarnessModel(checkpoint=str(trained_model.folder), batch_size="auto", device="cuda:0")


def test_it_is_registered(lm):
    assert get_model("mhmoe") is MHMoEHarnessModel
    assert lm.eot_token_id == lm.prefix_token_id == lm.hub.src_dict.eos() and lm.max_length == 64
    assert lm.get_model_info()["model_num_parameters"] > 1000


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihoods_equal_fairseqs(lm, trained_model, batch_size):
    lm = MHMoEHarnessModel(checkpoint=str(trained_model.folder), batch_size=batch_size, device="cpu")
    pairs = [("The river follows", " the captain"), ("", "A letter"), ("The doctor", " xx"), ("The", " river opens it")]
    for (context, continuation), (score, greedy) in zip(pairs, lm.loglikelihood(requests(*pairs), disable_tqdm=True)):
        expected = direct_scores(lm.hub, line_ids(lm.hub, context + continuation))
        known = len(line_ids(lm.hub, context)) if context else 0
        assert score == pytest.approx(expected[known:].sum().item(), rel=1e-6)
        assert not greedy or score > -5


def test_rolling_log_likelihoods_equal_fairseqs(lm):
    texts = ["The river follows the captain.", "", "One line.\nAnother line"]
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    assert found[0] == pytest.approx(direct_scores(lm.hub, line_ids(lm.hub, texts[0])).sum().item(), rel=1e-6)
    assert found[1] == 0
    lines = [*line_ids(lm.hub, "One line."), lm.eot_token_id, *line_ids(lm.hub, "Another line")]
    assert found[2] == pytest.approx(direct_scores(lm.hub, lines).sum().item(), rel=1e-6)


def test_rolling_windows_are_lm_evals(lm):
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(4, 204))
    expected = get_rolling_token_windows(tokens, lm.prefix_token_id, lm.max_length, 1)
    ours = lm.scorer.windows([lm.prefix_token_id, *tokens], len(tokens))
    assert [(window.inputs, window.targets) for window in ours] == [(list(a), list(b)) for a, b in expected]


def test_greedy_generation_equals_fairseqs_generator(lm):
    prompts = ["The river", "The captain mends the garden near", "The doctor crosses the old"]
    arguments = {"until": [], "max_gen_toks": 15}
    found = lm.generate_until(requests(*((prompt, arguments) for prompt in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, found):
        [expected] = continue_prompts(lm.hub, [prompt], Search(max_len_b=len(line_ids(lm.hub, prompt)) + 15))
        assert expected.text in (f"{prompt} {text}", f"{prompt}{text}")  # a new word, the end of one
        assert lm.generate_until(requests((prompt, arguments)), disable_tqdm=True) == [text]


def test_generation_stops(lm):
    def generate(context, **arguments):
        return lm.generate_until(requests((context, arguments)), disable_tqdm=True)[0]

    whole = generate("The river", until=["\n"], max_gen_toks=40)
    assert whole.endswith(".") and "\n" not in whole  # trained on lines that end so: </s> came
    word = whole.split()[2]
    assert generate("The river", until=word, max_gen_toks=40) == whole[: whole.index(word)]
    assert generate("The river", until=["~", word], max_new_tokens=40) == whole[: whole.index(word)]
    assert whole.startswith(generate("The river", max_gen_toks=3)) and len(generate("The river", max_gen_toks=3)) < 20


def test_prompts_of_several_lines_and_over_long_ones(lm):
    arguments = {"until": ["\n"], "max_gen_toks": 20}
    contexts = ["The doctor opens.\nThe river", "The river " * 60, "", "\n"]
    together = lm.generate_until(requests(*((context, arguments) for context in contexts)), disable_tqdm=True)
    alone = [lm.generate_until(requests((context, arguments)), disable_tqdm=True)[0] for context in contexts]
    assert together == alone and all(together)
    tokens = [2, *line_ids(lm.hub, "The doctor opens."), 2, *line_ids(lm.hub, "The river")]
    first = line_ids(lm.hub, f"The river {together[0]}")[len(line_ids(lm.hub, "The river"))]
    with torch.no_grad():
        log_probs = lm.hub.models[0](torch.tensor([tokens]))[0][0, -1]
    log_probs[lm.hub.src_dict.pad()] = -torch.inf
    assert int(log_probs.argmax()) == first


def test_sampling_follows_torchs_seed(lm):
    arguments = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.5}

    def sample(seed, **more):
        torch.manual_seed(seed)
        return lm.generate_until(requests(("The river", {**arguments, **more})), disable_tqdm=True)

    assert sample(1) == sample(1) != sample(2)
    greedy = lm.generate_until(requests(("The river", {"max_gen_toks": 20})), disable_tqdm=True)
    assert sample(1, top_k=1) == sample(2, top_p=1e-6) == greedy
    assert sample(1, do_sample=False) == sample(1, temperature=0) == greedy


def test_generation_arguments():
    found = read_generation_arguments({"until": "x", "max_tokens": 500, "top_k": 0}, 256, 64)
    assert found == (Search(), ("x",), 32)
    found = read_generation_arguments({"do_sample": True, "top_p": 1.0, "top_k": 5, "temperature": 2}, 7, 64)
    assert found == (Search(sampling=True, temperature=2.0, top_k=5), (), 7)
    for arguments, message in (
        ({"repetition_penalty": 2}, "generation argument repetition_penalty is not supported; known are until"),
        ({"max_gen_toks": 0}, r"max_gen_toks \(0\) must be at least 1"),
        ({"do_sample": True, "temperature": -1}, r"temperature \(-1.0\) must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            read_generation_arguments(arguments, 256, 64)


def test_beams_are_refused(lm):
    with pytest.raises(ValueError, match=r"num_beams \(4\) must be 1"):
        lm.generate_until(requests(("The river", {"num_beams": 4})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "--model_args checkpoint=FILE is needed"),
        ({"checkpoint": "x", "dtype": "auto"}, "--model_args dtype: no such argument"),
        ({"checkpoint": "x", "batch_size": "many"}, r"--batch_size \(many\) must be a positive number or auto"),
        ({"checkpoint": "x", "device": "abacus"}, "device abacus: no such device"),
        ({"checkpoint": "x", "precision": "fp8"}, r"precision \(fp8\) must be one of fp32, bf16, auto"),
    ],
)
def test_bad_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MHMoEHarnessModel(**arguments)


def expected_figures(lm, local_tasks):
    """Accuracy, word perplexity and generations of the local tasks, from single requests."""
    rows = [json.loads(line) for line in (local_tasks / "local.jsonl").read_text(encoding="utf-8").splitlines()]
    right, log_prob, words = 0, 0.0, 0
    for row in rows:
        pairs = requests(*((row["question"], f" {choice}") for choice in row["choices"]))
        scores = [score for score, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
        right += scores.index(max(scores)) == row["answer"]
        text = f"{row['question']} {row['choices'][0]}"
        log_prob += lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)[0]
        words += len(text.split())
    contexts = requests(*((row["question"], {"until": ["."], "max_gen_toks": 12}) for row in rows))
    return right / len(rows), math.exp(-log_prob / words), lm.generate_until(contexts, disable_tqdm=True)


def test_tasks_of_every_kind(lm, trained_model, local_tasks):
    """By lm-eval's evaluator, from its arguments as strings; without its packaged tasks, whose index takes long."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="mhmoe",
        model_args=f"checkpoint={trained_model.checkpoint},data={trained_model.data},max_batch_tokens=256",
        tasks=["local_choice", "local_rolling", "local_until"],
        task_manager=TaskManager(include_path=str(local_tasks), include_defaults=False),
        batch_size=4,
        device="cpu",
    )
    accuracy, perplexity, texts = expected_figures(lm, local_tasks)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(accuracy)
    assert found["results"]["local_rolling"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-6)
    assert [sample["resps"][0][0] for sample in found["samples"]["local_until"]] == texts
    assert found["config"]["model_num_parameters"] == lm.get_model_info()["model_num_parameters"]


@pytest.mark.slow
def test_lm_evals_command_line(lm, trained_model, local_tasks, capsys):
    """One task by its file, two by --include_path: figures are those of direct scoring."""
    status = main([
        "zero-shot", "lm-eval", "--tasks", f"{local_tasks / 'choice.yaml'},local_rolling,local_until", "--include_path",
        str(local_tasks), "--model_args", f"checkpoint={trained_model.checkpoint},data={trained_model.data}",
        "--batch_size", "auto", "--device", "cpu", "--output_path", str(local_tasks / "out"), "--log_samples",
    ])  # fmt: skip
    assert status == 0 and "local_choice" in capsys.readouterr().out
    [path] = (local_tasks / "out").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    accuracy, perplexity, texts = expected_figures(lm, local_tasks)
    assert results["local_choice"]["acc,none"] == pytest.approx(accuracy)
    assert results["local_rolling"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-6)
    record = read_record(trained_model.folder / "record-zero-shot-lm-eval.json")
    assert record.parts["local_choice"]["acc"].value == pytest.approx(accuracy) and record.provenance["command"]
    assert set(record.parts) == {"local_choice", "local_rolling", "local_until"}
    [samples] = (local_tasks / "out").rglob("samples_local_until_*.jsonl")
    assert [json.loads(line)["resps"][0][0] for line in samples.read_text(encoding="utf-8").splitlines()] == texts


@pytest.mark.slow
def test_errors_of_lm_evals_command_line_are_one_line(trained_model, local_tasks, capsys):
    task = str(local_tasks / "choice.yaml")
    for words, message in (
        (["--tasks", "no_such_task_here", "--model_args", "checkpoint=x"], "Tasks not found: no_such_task_here"),
        (["--tasks", task, "--model_args", f"checkpoint={local_tasks}"], "no model.pt or checkpoint_best.pt"),
        (
            ["--tasks", task, "--model_args", f"checkpoint={trained_model.folder},lang=de"],
            "lang de: the dictionary has no __de__",
        ),
    ):
        assert main(["zero-shot", "lm-eval", *words]) == 2
        assert f"mhmoe zero-shot: error: {message}" in capsys.readouterr().err.splitlines()[-1]


def test_our_model_is_the_default():
    assert complete(["--tasks", "piqa"]) == ["--tasks", "piqa", "--model", "mhmoe"]
    assert complete(["run", "--tasks", "piqa"])[-2:] == ["--model", "mhmoe"]
    assert complete(["--model=hf", "--tasks", "piqa"]) == ["--model=hf", "--tasks", "piqa"]
    assert complete(["ls", "tasks"]) == ["ls", "tasks"] and complete([]) == []


def test_help_is_ours_and_lm_evals(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["zero-shot", "lm-eval", "--help"])
    out = capsys.readouterr().out
    assert exit_status.value.code == 0
    assert "--model_args of mhmoe" in out and "lm-evaluation-harness" in out


def test_without_lm_eval(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mhmoe_fairseq.evaluation.lm_eval_model")
    install = 'lm-eval is not installed: pip install "mhmoe-fairseq[lm-eval]"'
    with pytest.raises(ValueError) as error:
        importlib.import_module("mhmoe_fairseq.evaluation.lm_eval_model")
    assert str(error.value) == install
    for words in (["lm-eval", "--tasks", "piqa"], ["xnli", "--checkpoint", str(tmp_path), "--xnli-dir", str(tmp_path)]):
        assert main(["zero-shot", *words]) == 2
        assert capsys.readouterr().err == f"mhmoe zero-shot: error: {install}\n"

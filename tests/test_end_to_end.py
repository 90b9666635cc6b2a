"""The whole chain through fairseq's console commands: train, evaluate, resume, generate."""

import copy
import shutil

import pytest
import torch
from console import USER_DIR, evaluate, logged, run_console, train, write_corpus
from fairseq import checkpoint_utils
from fairseq.sequence_scorer import SequenceScorer
from language_models import FAMILIES

from mhmoe_fairseq.models.language_model import MHMoELanguageModel

MOE_KEYS = {"gate_loss", "z_loss", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """Each family trained for 40 updates: checkpoint folder and log by name."""
    root = tmp_path_factory.mktemp("trained")
    return {
        family: (root / family, train(data, root / family, f"{family}_lm_tiny", real=family == "mhmoe"))
        for family in FAMILIES
    }


@pytest.fixture(scope="session")
def checkpoint(trained):
    return trained["mhmoe"][0] / "checkpoint_best.pt"


def same_tensors(one, other, path="state"):
    """Assert that two nested states agree bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same_tensors(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other)):
            same_tensors(a, b, f"{path}.{index}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(trained, family):
    _, log = trained[family]
    valid = logged(log, "valid")
    assert valid["loss"] < 4  # the 60 words' entropy is 5.9 bits, the grammar's about 1.2
    assert valid["ppl"] == pytest.approx(2 ** valid["loss"], rel=0.01)
    assert MOE_KEYS & valid.keys() == (set() if family == "dense" else MOE_KEYS)
    if family != "dense":
        assert valid["moe_active"] > 0.5 and valid["moe_overflow"] == 0 and valid["gate_loss"] >= 0.9


def test_no_validation_token_is_lost(trained, data):
    # 862 test tokens; the last, incomplete batch is part of them on both fairseq versions.
    log = evaluate(data, trained["dense"][0] / "checkpoint_best.pt", "--required-batch-size-multiple", 8, real=True)
    words = sum(len(line.split()) + 1 for line in (data.parent / "test.txt").read_text().splitlines())
    assert f"Evaluated {words} tokens" in log


def test_resuming_is_exact(trained, data, tmp_path):
    """40 updates = 20 + 20 resumed, bit for bit, with dropout."""
    folder = tmp_path / "resumed"
    train(data, folder, "mhmoe_lm_tiny", max_update=20)
    log = train(data, folder, "mhmoe_lm_tiny", max_update=40)
    assert "Loaded checkpoint" in log
    straight, resumed = (
        torch.load(path / "checkpoint_last.pt", weights_only=True) for path in (trained["mhmoe"][0], folder)
    )
    same_tensors(resumed["model"], straight["model"])
    same_tensors(resumed["last_optimizer_state"], straight["last_optimizer_state"])
    assert straight["last_optimizer_state"]["state"][0]["step"] == 40


def test_checkpoints_hold_plain_data(trained):
    for folder, _ in trained.values():
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        assert state["cfg"]["model"]["_name"].endswith("_lm_tiny")
        assert all(torch.is_tensor(value) for value in state["model"].values())


def test_the_official_recipe_trains(data, tmp_path):
    flags = (
        "--moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --moe-gating-use-fp32 "
        "--moe-normalize-gate-prob-before-dropping --moe-eval-capacity-token-fraction -1.0 --moe-gate-loss-wt 0.01 "
        "--moe-gate-loss-combine-method sum --mhmoe-heads-number 4 --moe-ffn-dim 2048 --activation-fn silu "
        "--rotary-embed --rms-norm --no-bias --no-token-positional-embeddings --no-scale-embedding "
        "--mhmoe-router linear --mhmoe-routing capacity --decoder-embed-dim 64 --decoder-attention-heads 4"
    ).split()
    log = train(data, tmp_path / "recipe", "mhmoe_lm_base", *flags, "--mhmoe-precision", "bf16", max_update=10)
    valid = logged(log, "valid")
    assert valid["loss"] < 6 and 0 < valid["moe_overflow"] < 0.9
    assert log.count("--moe-normalize-gate-prob-before-dropping has no effect") == 1


def test_torchscales_static_layer_trains_and_evaluates(data, tmp_path):
    log = train(data, tmp_path / "static", "xmoe_lm_tiny", "--mhmoe-routing", "torchscale", max_update=10)
    assert logged(log, "valid")["moe_overflow"] >= 0
    assert "Perplexity" in evaluate(data, tmp_path / "static" / "checkpoint_best.pt")


def test_hydra_yaml(data, tmp_path):
    """One file, good for both fairseq versions: groups by ``_name``, the user directory absolute."""
    (tmp_path / "language_model.yaml").write_text(f"""# @package _group_
common: {{user_dir: {USER_DIR}, cpu: true, log_format: simple, log_interval: 5, bf16: false}}
task: {{_name: mhmoe_language_modeling, data: {data}, tokens_per_sample: 32}}
model: {{_name: mhmoe_lm_tiny, decoder_layers: 2, mhmoe_heads_number: 2, mhmoe_precision: bf16}}
criterion: {{_name: moe_cross_entropy, moe_gate_loss_wt: 0.02, moe_gate_loss_combine_method: sum}}
optimizer: {{_name: adam, adam_betas: '(0.9,0.98)'}}
lr_scheduler: {{_name: fixed}}
dataset: {{batch_size: 4, num_workers: 0}}
optimization: {{max_update: 10, lr: [0.002]}}
checkpoint: {{save_dir: {tmp_path / "saved"}, no_epoch_checkpoints: true}}
distributed_training: {{distributed_world_size: 1}}
""")
    run_console("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "language_model", cwd=tmp_path)
    state = torch.load(tmp_path / "saved" / "checkpoint_last.pt", weights_only=True)
    model = state["cfg"]["model"]
    assert (model["mhmoe_heads_number"], model["decoder_embed_dim"], model["moe_top_k"]) == (2, 128, 2)
    assert (model["mhmoe_precision"], model["mhmoe_budget"]) == ("bf16", "params")
    assert state["cfg"]["criterion"]["moe_gate_loss_wt"] == 0.02
    assert "decoder.layers.1.moe_layer.experts.fc1_weight" in state["model"]
    assert "Perplexity" in evaluate(data, tmp_path / "saved" / "checkpoint_last.pt")


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("mode", ["none", "complete"])
def test_perplexity_does_not_depend_on_the_batch_size(checkpoint, data, mode):
    results = {
        evaluate(data, checkpoint, "--batch-size", size, "--sample-break-mode", mode)
        .split("Loss (base 2): ")[1]
        .strip()
        for size in (1, 8, 64)
    }
    assert len(results) == 1, results


@pytest.fixture(scope="module")
def loaded(checkpoint):
    models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    return models[0].eval(), config, task


@pytest.mark.parametrize("mode", ["none", "complete"])
def test_token_scores_do_not_depend_on_the_batch_size(loaded, mode):
    model, _, task = loaded
    model = copy.deepcopy(model).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task.args.sample_break_mode = mode
    task.load_dataset("test")
    scores = {}
    for size in (1, 8, 64):
        iterator = task.eval_lm_dataloader(task.dataset("test"), batch_size=size, num_workers=0)
        scorer = SequenceScorer(task.target_dictionary)
        scores[size] = {
            int(number): hypothesis[0]["positional_scores"]
            for batch in iterator
            for number, hypothesis in zip(batch["id"], scorer.generate([model], batch))
        }
    assert scores[1].keys() == scores[8].keys() == scores[64].keys()
    for number, expected in scores[1].items():
        for size in (8, 64):
            torch.testing.assert_close(scores[size][number], expected, rtol=0, atol=1e-9)
    same_tensors(dict(model.state_dict()), before)


def test_another_dictionary_is_refused(checkpoint, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    words = (other / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join(words[::-1]) + "\n")  # the same words in another order
    log = evaluate(other, checkpoint, check=False)
    assert "UserError: the checkpoint's dictionary" in log.splitlines()[-1]
    assert "Perplexity" not in log


def test_bf16_of_fairseq_names_ours(data, tmp_path):
    log = train(data, tmp_path / "tpu", "mhmoe_lm_tiny", "--bf16", check=False)
    assert "--mhmoe-precision bf16" in log.splitlines()[-1]
    assert "begin training epoch" not in log


# ---------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def hub(checkpoint):
    return MHMoELanguageModel.from_pretrained(str(checkpoint.parent))


PROMPTS = ["w1 w4", "w7 w22 w8", "w30"]


def test_score_is_the_models_log_probability(hub):
    result = hub.score("w1 w4 w13")
    tokens = hub.encode("w1 w4 w13")
    source = torch.cat([tokens[-1:], tokens[:-1]])[None]
    log_probs = hub.models[0](source)[0].log_softmax(-1)[0]
    expected = log_probs.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(result["positional_scores"], expected[:-1], rtol=1e-4, atol=1e-4)


def test_greedy_samples_are_the_argmax_of_full_decoding(hub):
    tokens = hub.encode(PROMPTS[1])[:-1]
    sampled = hub.sample(PROMPTS[1], beam=1, max_len_b=8, min_len=8).split()
    eos = hub.task.source_dictionary.eos()
    row = torch.cat([torch.tensor([eos]), tokens])
    for _ in range(4):
        logits = hub.models[0](row[None])[0][0, -1]
        logits[[eos, 1]] = float("-inf")
        row = torch.cat([row, logits.argmax()[None]])
    assert sampled[: len(row) - 1] == hub.string(row[1:]).split()


@pytest.mark.parametrize("beam", [1, 3])
def test_batched_generation_equals_one_by_one(hub, beam):
    encoded = [hub.encode(prompt)[:-1] for prompt in PROMPTS]
    together = hub.generate(encoded, beam=beam, max_len_b=10)
    for prompt, hypotheses in zip(encoded, together):
        alone = hub.generate([prompt], beam=beam, max_len_b=10)[0]
        for one, other in zip(hypotheses, alone):
            assert torch.equal(one["tokens"], other["tokens"])
            torch.testing.assert_close(one["score"], other["score"], rtol=0, atol=1e-5)


def test_interactive(checkpoint, data):
    output = run_console(
        "fairseq-interactive", data, "--user-dir", USER_DIR, "--task", "mhmoe_language_modeling",
        "--path", checkpoint, "--beam", 2, "--max-len-b", 8, "--cpu", "--buffer-size", 3, "--batch-size", 3,
        cwd=checkpoint.parent, stdin="\n".join(PROMPTS) + "\n",
    )  # fmt: skip
    hypotheses = [line.split("\t")[2] for line in output.splitlines() if line.startswith("H-")]
    assert [text.startswith(prompt) for text, prompt in zip(hypotheses, PROMPTS)] == [True] * 3

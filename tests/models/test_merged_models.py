"""Models with merged experts or experts that choose: decoding, padding, budgets, refusals, and whole trainings."""

import json
from pathlib import Path

import pytest
import torch
from beit3_models import beit3_batch, small_beit3
from console import evaluate, logged, run_console, train, write_corpus
from images_and_words import training_words, write_images_and_words
from language_models import count_model, small_model, token_rows

from mhmoe_fairseq.checkpoints.huggingface.mapping import describe_stack
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.experiments.models import MODELS
from mhmoe_fairseq.experiments.spec import parse_flags
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.flags import decoder_settings, encoder_settings

LORY = {"mhmoe_routing": "lory", "mhmoe_segment_length": 3}
ENCODER_ROUTINGS = ("smear", "expert-choice")


def lory_model(**flags):
    model = small_model("smoe_lm_tiny", moe_freq=1, **LORY, **flags).double().eval()
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.moe_layer.first_E)
        torch.nn.init.normal_(layer.moe_layer.router.weight)
    return model


@pytest.mark.parametrize("prefix", [0, 1, 3, 5])
def test_decoding_step_by_step_equals_the_whole_pass_whatever_beams_do(prefix):
    model, tokens = lory_model(), token_rows([11, 11, 11, 11])
    state, order = {"is_first_step": prefix > 0}, torch.tensor([3, 0, 0, 2])
    if prefix:
        model.decoder(tokens[:, :prefix], incremental_state=state)
        state["is_first_step"] = False
    for length in range(prefix + 1, 12):
        step, _ = model.decoder(tokens[:, :length], incremental_state=state)
        torch.testing.assert_close(step[:, -1], model(tokens[:, :length])[0][:, -1], rtol=1e-9, atol=1e-9)
        model.decoder.reorder_incremental_state_scripting(state, order)
        tokens = tokens[order].clone()
        tokens[:, length:] = token_rows([11] * 4, seed=length)[:, length:]


def test_left_padding_changes_nothing_and_neither_does_right():
    model = lory_model(no_token_positional_embeddings=True, rotary_embed=True)
    row = token_rows([8])
    scores, extra = model(row)
    for left, right in ((4, 0), (0, 4), (2, 5)):
        padded = torch.nn.functional.pad(row, (left, right), value=1)
        found, padded_extra = model(padded, self_attn_padding_mask=padded.eq(1))
        torch.testing.assert_close(found[:, left : left + 8], scores, rtol=1e-5, atol=1e-6)
        for one, other in zip(padded_extra["moe"], extra["moe"]):
            torch.testing.assert_close(one.stats.expert_load, other.stats.expert_load)


def test_left_padded_prompts_are_continued_alike():
    model, state = lory_model(no_token_positional_embeddings=True, rotary_embed=True), {}
    row = token_rows([8])
    padded = torch.nn.functional.pad(row, (4, 0), value=1)
    for length in range(1, 13):
        mask = padded[:, :length].eq(1)
        step, _ = model.decoder(padded[:, :length], self_attn_padding_mask=mask, incremental_state=state)
    torch.testing.assert_close(step[:, -1], model(row)[0][:, -1], rtol=1e-5, atol=1e-6)


def test_checkpointed_activations_give_the_same_gradients():
    model = small_model("smoe_lm_tiny", moe_freq=1, checkpoint_activations=True, **LORY).double().train()
    model(token_rows([9, 5]))[0].square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    expected = small_model("smoe_lm_tiny", moe_freq=1, **LORY).double().train()
    expected(token_rows([9, 5]))[0].square().sum().backward()
    for one, other in zip(gradients, expected.parameters()):
        torch.testing.assert_close(one, other.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["image", "text", "pair"])
@pytest.mark.parametrize("routing", ENCODER_ROUTINGS)
def test_beit3_routes_images_texts_and_pairs_and_no_padding(routing, kind):
    model = small_beit3("smoe_beit3_tiny", mhmoe_routing=routing).double().eval()
    batch, longer = beit3_batch(kind, [5, 5]), beit3_batch(kind, [5, 5])
    if "text_tokens" in batch:
        longer["text_tokens"] = torch.nn.functional.pad(longer["text_tokens"], (0, 3), value=1)
    (features, extra), (padded, padded_extra) = model.beit3(**batch), model.beit3(**longer)
    torch.testing.assert_close(padded[:, : features.size(1)], features, rtol=1e-9, atol=1e-9)
    stats, padded_stats = extra["moe"][1].stats, padded_extra["moe"][1].stats
    torch.testing.assert_close(padded_stats.expert_load, stats.expert_load)
    assert extra["moe"][1].balance_loss == 0 and stats.num_subtokens == features.size(0) * features.size(1)


def test_separate_pools_of_experts_that_choose():
    model = small_beit3("mhmoe_beit3_tiny", mhmoe_routing="expert-choice", mhmoe_modality_experts="separate").eval()
    _, extra = model.double().beit3(**beit3_batch("pair", [8, 8]))
    load = extra["moe"][1].stats.expert_load
    assert load.shape == (2, 8) and (load == load[:, :1]).all()


def test_loads_and_counts_of_a_lory_model():
    model = lory_model()
    _, extra = model(token_rows([9, 4]))
    assert extra["moe"][0].stats.expert_load.sum() == pytest.approx(13)
    options = architecture_options("smoe_lm_tiny", **LORY)
    counts = count_model(options)
    assert counts.active == counts.total and counts.moe.top_k == 1


@pytest.mark.parametrize("sizes, percent", [("tiny", 2.0), ("base", 1.0)])
def test_the_study_s_model_spends_what_xmoe_spends(sizes, percent):
    counts = {}
    for name in ("lory", "xmoe"):
        row = MODELS[name]
        words = parse_flags(row.flags) | (parse_flags(row.paper_flags) if sizes == "base" else {})
        flags = {flag[2:].replace("-", "_"): value[0] for flag, value in words.items()}
        flags = {flag: int(value) if value.isdigit() else value for flag, value in flags.items()}
        counts[name] = count_model(architecture_options(f"{row.kind}_lm_{sizes}", **flags))
    one, other = counts["lory"], counts["xmoe"]
    assert abs(one.total / other.total - 1) < 0.005
    assert abs(one.flops_per_token / other.flops_per_token - 1) < 2 * percent / 100


REFUSED = [
    ({"mhmoe_routing": "lory", "moe_top_k": 2}, r"--moe-top-k \(2\) cannot be combined with --mhmoe-routing lory: "),
    ({"mhmoe_routing": "lory", "mhmoe_heads_number": 2}, r"--mhmoe-heads-number \(2\) cannot be combined with"),
    (
        {"mhmoe_routing": "lory", "mhmoe_granularity": 2},
        r"--mhmoe-granularity \(2\) must be 1 with",
    ),
    ({"mhmoe_routing": "lory", "mhmoe_expert_parallel_size": 2}, r"--mhmoe-expert-parallel-size \(2\) must be 1 with"),
    ({"mhmoe_routing": "lory", "mhmoe_capacity_factor": 2.0}, "--mhmoe-capacity-factor is about capacity; it contra"),
    ({"mhmoe_routing": "lory", "mhmoe_quantize": "experts"}, r"--mhmoe-quantize \('experts'\) cannot be combined with"),
    ({"mhmoe_segment_length": 8}, "--mhmoe-segment-length needs --mhmoe-routing lory, not dropless"),
    ({"mhmoe_routing": "capacity", "mhmoe_segment_length": 8}, "needs --mhmoe-routing lory, not capacity"),
    ({"mhmoe_routing": "smear"}, "--mhmoe-routing smear is for BEiT-3 and not for language models: its weights come"),
    ({"mhmoe_routing": "expert-choice"}, "expert-choice is for BEiT-3 and not for language models: an expert takes"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_what_a_language_model_refuses(flags, message):
    with pytest.raises(UserError, match=message):
        decoder_settings(architecture_options("smoe_lm_tiny", **flags), 40)


ENCODER_REFUSED = [
    ({"mhmoe_routing": "lory"}, "--mhmoe-routing lory is for language models: "),
    (
        {"mhmoe_routing": "smear", "mhmoe_modality_experts": "separate"},
        "separate cannot be combined with --mhmoe-routing",
    ),
    (
        {"mhmoe_routing": "expert-choice", "moe_eval_capacity_token_fraction": 0.5},
        "it contradicts expert-choice routing",
    ),
    (
        {"mhmoe_routing": "expert-choice", "mhmoe_normalize_gates": "on"},
        r"--mhmoe-normalize-gates \(on\) contradicts --mhmoe-routing expert-choice",
    ),
]


@pytest.mark.parametrize("flags, message", ENCODER_REFUSED)
def test_what_an_encoder_refuses(flags, message):
    with pytest.raises(UserError, match=message):
        encoder_settings(architecture_options("smoe_beit3_tiny", **flags), 40)


@pytest.mark.parametrize("arch, routing", [("lm", "lory"), ("beit3", "smear"), ("beit3", "expert-choice")])
def test_none_of_them_is_exported(arch, routing):
    options = architecture_options(f"smoe_{arch}_tiny", mhmoe_routing=routing)
    settings = (decoder_settings if arch == "lm" else encoder_settings)(options, 40)
    with pytest.raises(UserError, match=f"--mhmoe-routing {routing} cannot be exported: "):
        describe_stack(options, settings, "decoder" if arch == "lm" else "encoder")


# ---------------------------------------------------------------------- whole trainings


def test_a_lory_model_is_trained_evaluated_analysed_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture):
    data, folder = write_corpus(tmp_path), tmp_path / "lory"
    flags = "--mhmoe-routing lory --mhmoe-segment-length 8 --mhmoe-load-log loads.jsonl".split()
    log = train(data, folder, "smoe_lm_tiny", *flags)
    valid = logged(log, "valid")
    assert valid["loss"] < 4 and valid["moe_active"] == 1 and valid["gate_loss"] == 0
    assert "Evaluated" in evaluate(data, folder / "checkpoint_best.pt")
    [line] = (tmp_path / "loads.jsonl").read_text().splitlines()[-1:]
    assert len(json.loads(line)["load"][0]) == 8
    checkpoint, record = str(folder / "checkpoint_last.pt"), tmp_path / "record.json"
    assert main(["evaluate", checkpoint, "--data", str(data), "--json", str(record)]) == 0, capsys.readouterr().err
    assert json.loads(record.read_text())["experts"]


@pytest.mark.parametrize("routing", ENCODER_ROUTINGS)
def test_beit3_is_trained(routing, tmp_path: Path):
    data = write_images_and_words(tmp_path / "data")
    flags = ["--arch", "smoe_beit3_tiny", "--mhmoe-heads-number", 1, "--mhmoe-routing", routing]
    flags += ["--moe-top-k", 1] if routing == "smear" else []
    log = run_console("fairseq-train", *training_words(data, tmp_path / "run", *flags, updates=6), cwd=data)
    assert '"train_loss"' in log and (tmp_path / "run" / "checkpoint_last.pt").is_file()

"""Weights of the official repository compute the same here: against a slow reference of its forward pass."""

import argparse
import math

import official_reference
import pytest
import torch
from console import evaluate, train
from language_models import relative_error, small_dictionary
from moe_oracle import eight_bits, ternary
from official_reference import BITNET, OLDER, PUBLISHED, below, official_logits, official_moe_layer, official_state
from omegaconf import OmegaConf

from mhmoe_fairseq.checkpoints.official.importing import merge_ranks, read_official
from mhmoe_fairseq.checkpoints.official.mapping import rows_for_rotary
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models.language_model import MHMoELanguageModel
from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

MOE = "decoder.layers.1.moe_layer."
VARIANTS = {
    "recipe": PUBLISHED,
    "top-3": {**PUBLISHED, "moe_top_k": 3},
    "x-moe": {**PUBLISHED, "use_xmoe": True, "moe_top_k": 2, "mhmoe_heads_number": 2},
    "smoe": {**PUBLISHED, "mhmoe_heads_number": 1, "moe_top_k": 2},
    "biases": {**PUBLISHED, "no_bias": False, "rms_norm": False, "subln": True},
    "older": OLDER,
    "older top-1": {**OLDER, "moe_top1_expert": True, "use_xmoe": False},
}


def write(path, state, settings, **more):
    torch.save({"args": None, "cfg": {"model": settings, "task": {"_name": "gpt"}}, "model": state, **more}, path)
    return path


def import_official(capsys, *arguments):
    status = main(["checkpoint", "import-official", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    small_dictionary(words=40).save(str(folder / "dict.txt"))
    return folder


def imported_layer(folder):
    [(index, layer)] = torch.load(folder / "moe_layers.pt", weights_only=True).items()
    assert index == 1
    module = MHMoELayer(MHMoEConfig(**layer["config"])).double().eval()
    module.load_state_dict({name: value.double() for name, value in layer["state"].items()})
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_outputs(variant, tmp_path, capsys):
    settings = VARIANTS[variant]
    state = {name: value.float() for name, value in official_state(settings, 44).items()}
    write(tmp_path / "official.pt", state, settings)
    status, out, err = import_official(
        capsys, tmp_path / "official.pt", "--out", tmp_path, "--layers-only", "--routing", "dropless"
    )
    assert status == 0, err
    layer = imported_layer(tmp_path)
    parameters = sum(p.numel() for p in layer.parameters())
    assert out == f"{tmp_path / 'moe_layers.pt'}: 1 MoE layers, {parameters:,} parameters\n"
    assert parameters == sum(value.numel() for value in below(state, MOE).values())
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = official_moe_layer(
        x.flatten(0, 1),
        {name: value.double() for name, value in below(state, MOE).items()},
        heads=settings["mhmoe_heads_number"],
        top_k=settings.get("moe_top_k") or 2 - settings["moe_top1_expert"],
        capacity=None,
        renormalise="moe_top_k" not in settings and not settings["moe_top1_expert"],
    )
    with torch.no_grad():
        assert relative_error(layer(x).hidden.flatten(0, 1), expected) < 1e-6


@pytest.mark.parametrize(("top_k", "training"), [(1, False), (3, False), (3, True)])
def test_capacity_drops_the_same(top_k, training, tmp_path, capsys):
    settings = {**PUBLISHED, "moe_top_k": top_k, "dropout": 0.0}
    state = {name: value.float() for name, value in official_state(settings, 44).items()}
    write(tmp_path / "official.pt", state, settings)
    assert import_official(capsys, tmp_path / "official.pt", "--out", tmp_path, "--layers-only")[0] == 0
    layer = imported_layer(tmp_path).train(training)
    x = torch.randn(15, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moe = {name: value.double() for name, value in below(state, MOE).items()}
    capacity = top_k * math.ceil(15 * 4 / 4)
    expected = official_moe_layer(x, moe, heads=4, top_k=top_k, capacity=capacity)
    unlimited = official_moe_layer(x, moe, heads=4, top_k=top_k, capacity=None)
    output = layer(x)
    assert output.stats.dropped > 0 and relative_error(unlimited, expected) > 0.01
    assert relative_error(output.hidden.detach(), expected) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_model(variant, tmp_path, data, capsys):
    settings = VARIANTS[variant]
    state = {name: value.float() for name, value in official_state(settings, 44).items()}
    write(tmp_path / "official.pt", state, settings)
    arguments = (tmp_path / "official.pt", "--data", data, "--out", tmp_path / "out", "--routing", "dropless")
    status, out, err = import_official(capsys, *arguments)
    assert status == 0 and "4 experts of 24" in out, err
    hub = MHMoELanguageModel.from_pretrained(str(tmp_path / "out"))
    model = hub.models[0].double()
    tokens = torch.randint(4, 44, (12,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(tokens[None])[0][0]
    expected = official_logits(tokens, {name: value.double() for name, value in state.items()}, settings)
    assert relative_error(logits, expected) < 1e-6
    # The hub starts from the end mark: compare with the reference fed the same.
    row = torch.cat([torch.tensor([2]), tokens[:-1]])
    log_probs = official_logits(row, {name: value.double() for name, value in state.items()}, settings).log_softmax(-1)
    scores = hub.score(hub.string(tokens))["positional_scores"]
    torch.testing.assert_close(scores.double(), log_probs.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"quant_ffn_only": True, "moe_freq": 1}], ids=["all", "experts"])
def test_bitnet_model(changes, tmp_path, data, capsys, monkeypatch):
    """All maps of attention and networks round their weight and input; router, head and merge projections do not."""
    settings = {**BITNET, **changes}
    state = {name: value.float() for name, value in official_state(settings, 44).items()}
    write(tmp_path / "official.pt", state, settings)
    arguments = (tmp_path / "official.pt", "--data", data, "--out", tmp_path / "out", "--routing", "dropless")
    status, out, err = import_official(capsys, *arguments)
    assert status == 0 and f"--mhmoe-quantize {'experts' if changes else 'all'}" in out, err
    plain = official_reference.apply_linear

    def rounded(x, state, name):
        if any(other.startswith("gate.") for other in state) or (changes and "k_proj.weight" in state):
            return plain(x, state, name)
        rows = torch.stack([eight_bits(row) for row in x.view(-1, x.size(-1))]).view(x.shape)
        return plain(rows, {**state, f"{name}.weight": ternary(state[f"{name}.weight"])}, name)

    monkeypatch.setattr(official_reference, "apply_linear", rounded)
    tokens = torch.randint(4, 44, (12,), generator=torch.Generator().manual_seed(2))
    expected = official_logits(tokens, {name: value.double() for name, value in state.items()}, settings)
    model = MHMoELanguageModel.from_pretrained(str(tmp_path / "out")).models[0]
    latent = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    model.load_state_dict(latent)  # opened, it had been rounded in float32
    with torch.no_grad():
        assert relative_error(model.double()(tokens[None])[0][0], expected) < 1e-6


@pytest.mark.slow
def test_fairseq_evaluates_and_trains_it(trained_model, tmp_path, capsys):
    """The imported checkpoint goes through fairseq's own commands, trained on with the flags that are printed."""
    settings = {**PUBLISHED, "tokens_per_sample": 64}
    vocabulary = len((trained_model.data / "dict.txt").read_text(encoding="utf-8").splitlines()) + 4
    write(tmp_path / "official.pt", official_state(settings, vocabulary), settings)
    arguments = (tmp_path / "official.pt", "--data", trained_model.data, "--out", tmp_path / "out")
    status, out, err = import_official(capsys, *arguments)
    assert status == 0, err
    path = tmp_path / "out" / "model.pt"
    assert "Perplexity" in evaluate(trained_model.data, path, "--tokens-per-sample", 64)
    flags = out.splitlines()[1].split(f"--finetune-from-model {path} --arch ")[1].split()
    log = train(
        trained_model.data, tmp_path / "saved", *flags, "--tokens-per-sample", 64, "--finetune-from-model", path,
        max_update=2,
    )  # fmt: skip
    assert f"Loaded checkpoint {path}" in log
    before, after = (torch.load(file, weights_only=True) for file in (path, tmp_path / "saved" / "checkpoint_last.pt"))
    assert before["model"].keys() == after["model"].keys()
    same = {"mhmoe_routing", "moe_ffn_dim", "mhmoe_projection_bias", "rotary_embed", "no_bias", "mhmoe_heads_number"}
    assert all(before["cfg"]["model"][name] == after["cfg"]["model"][name] for name in same)


def test_rotary_rows():
    weight = torch.arange(16.0)[:, None]
    assert rows_for_rotary(weight, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_stored_in_half_precision_and_as_a_namespace(tmp_path, data, capsys):
    state = {name: value.half() for name, value in official_state(PUBLISHED, 44).items()}
    path = tmp_path / "old.pt"
    torch.save({"args": argparse.Namespace(**PUBLISHED), "model": state}, path)
    assert import_official(capsys, path, "--data", data, "--out", tmp_path / "out")[0] == 0
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    assert all(value.dtype != torch.float16 for value in saved.values())
    embedding, projection = saved["decoder.embed_tokens.weight"], saved["decoder.output_projection.weight"]
    assert embedding.data_ptr() == projection.data_ptr()  # shared weights are stored once
    name = "decoder.layers.0.self_attn.v_proj.weight"
    assert torch.equal(saved[name], state[name].float())


def test_omegaconf_settings(tmp_path, capsys):
    state = official_state(PUBLISHED, 44)
    torch.save({"cfg": OmegaConf.create({"model": PUBLISHED}), "model": state}, tmp_path / "conf.pt")
    assert import_official(capsys, tmp_path / "conf.pt", "--out", tmp_path / "out")[0] == 0
    assert torch.load(tmp_path / "out" / "model.pt", weights_only=True)["cfg"]["model"]["mhmoe_heads_number"] == 4


# ---------------------------------------------------------------------- ranks


def split_by_rank(state, ranks, num_experts=4):
    """What each rank holds: its experts, numbered from 0."""
    each = max(num_experts // ranks, 1)
    for rank in range(ranks):
        first = rank * each % num_experts
        local = {}
        for expert in range(each):
            prefix = f"{MOE}experts.{first + expert}."
            local.update({f"{MOE}experts.{expert}.{name}": value for name, value in below(state, prefix).items()})
        yield local


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_ranks_are_merged(ranks, shared, tmp_path):
    state = official_state(PUBLISHED, 44)
    dense = {name: value for name, value in state.items() if ".experts." not in name}
    for rank, local in enumerate(split_by_rank(state, ranks)):
        write(tmp_path / f"checkpoint_last-rank-{rank}.pt", local if shared else {**dense, **local}, PUBLISHED)
    if shared:
        write(tmp_path / "checkpoint_last-shared.pt", dense, PUBLISHED)
    merged, settings = read_official(tmp_path / "checkpoint_last-rank-0.pt")
    assert settings == PUBLISHED and merged.keys() == state.keys()
    assert all(torch.equal(merged[name], value) for name, value in state.items())


def test_missing_ranks_are_named(tmp_path, capsys):
    state = official_state(PUBLISHED, 44)
    locals_ = list(split_by_rank(state, 4))
    dense = {name: value for name, value in state.items() if ".experts." not in name}
    with pytest.raises(ValueError, match=r"the 3 rank files have \[1, 1, 1\] experts; moe_expert_count is 4"):
        merge_ranks(dense, locals_[:3], 4)
    for rank in (0, 2):
        write(tmp_path / f"c-rank-{rank}.pt", locals_[rank], PUBLISHED)
    status, _, err = import_official(capsys, tmp_path / "c-rank-0.pt", "--out", tmp_path / "out")
    assert status == 2 and "of c-rank-*.pt only [0, 2] are there" in err
    write(tmp_path / "d-shared.pt", dense, PUBLISHED)
    status, _, err = import_official(capsys, tmp_path / "d-shared.pt", "--out", tmp_path / "out")
    assert status == 2 and "no d-rank-*.pt beside" in err


# ---------------------------------------------------------------------- refusals


class Unknown:
    """Stands for any class that a checkpoint should not hold."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 1, "input_bits": 8}, "for: weight_bits=1; input_bits=8"),
        ({**BITNET, "fc2_bits": 4}, "for: fc2_bits=4"),
        ({**BITNET, "absmean_alpha": 2.0}, "for: absmean_alpha=2.0"),
        ({**BITNET, "quant_ffn_only": True}, "for: quant_ffn_only=True"),
        ({**BITNET, "weight_quant_method": "bwn"}, "for: weight_bits=1; input_bits=8"),
        ({"moe_lora_rank": 4}, "moe_lora_rank=4"),
        ({"n_kv_heads": 2}, "n_kv_heads=2"),
        ({"deepnorm": True}, "deepnorm=True"),
        ({"xpos_rel_pos": True}, "xpos_rel_pos=True"),
        ({"input_quant_method": "absmax_per_token_relu"}, "input_quant_method=absmax_per_token_relu"),
        ({"activation_fn": "relu"}, r"activation_fn=relu, with gate weights (fc3)"),
    ],
)
def test_settings_without_a_counterpart_are_named(changes, message, tmp_path, capsys):
    write(tmp_path / "official.pt", official_state(PUBLISHED, 44), {**PUBLISHED, **changes})
    status, out, err = import_official(capsys, tmp_path / "official.pt", "--out", tmp_path / "out")
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (f"{MOE}lora_A.weight", f"for the weights {MOE}lora_A.weight"),
        ("decoder.layers.0.ffn.fc1.weight_clip_val", "decoder.layers.0.ffn.fc1.weight_clip_val"),
        ("encoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
        ("decoder.layers.0.self_attn.q_proj.bias", "self_attn.q_proj.bias is (32,) in it, missing in our model"),
        (f"{MOE}experts.4.fc1.weight", "experts must be numbered from 0 and have one shape"),
    ],
)
def test_weights_without_a_counterpart_are_named(added, message, tmp_path, capsys):
    state = {**official_state(PUBLISHED, 44), added: torch.zeros(32)}
    write(tmp_path / "official.pt", state, PUBLISHED)
    status, _, err = import_official(capsys, tmp_path / "official.pt", "--out", tmp_path / "out")
    assert status == 2 and message in err and err.count("\n") == 1


def test_settings_that_do_not_fit_the_weights(tmp_path, capsys):
    write(tmp_path / "official.pt", official_state(PUBLISHED, 44), {**PUBLISHED, "decoder_layers": 4})
    status, _, err = import_official(capsys, tmp_path / "official.pt", "--out", tmp_path / "out")
    assert status == 2 and "decoder.layers.2.self_attn.k_proj.weight is missing" in err
    write(tmp_path / "official.pt", official_state(PUBLISHED, 44), {**PUBLISHED, "moe_expert_count": 16})
    status, _, err = import_official(capsys, tmp_path / "official.pt", "--out", tmp_path / "out", "--layers-only")
    assert status == 2 and "layer 1: the weights do not fit the stored settings: experts.fc1_weight is (4, " in err
    assert not (tmp_path / "out").exists()
    status, _, err = import_official(
        capsys, tmp_path / "official.pt", "--out", tmp_path / "out", "--layers-only", "--data", tmp_path
    )
    assert status == 2 and f"--data {tmp_path} has no meaning with --layers-only" in err


def test_rms_norm_inside_experts_is_refused(tmp_path, capsys):
    settings = {**PUBLISHED, "subln": True}
    write(tmp_path / "official.pt", official_state(settings, 44), settings)
    status, _, err = import_official(capsys, tmp_path / "official.pt", "--out", tmp_path / "out")
    assert status == 2 and "experts.*.ffn_layernorm is an RMSNorm" in err


def test_the_checkpoint_itself_is_not_replaced(tmp_path, capsys):
    write(tmp_path / "model.pt", official_state(PUBLISHED, 44), PUBLISHED)
    before = (tmp_path / "model.pt").read_bytes()
    status, _, err = import_official(capsys, tmp_path / "model.pt", "--out", tmp_path)
    assert status == 2 and "model.pt in it is the checkpoint to import" in err
    assert (tmp_path / "model.pt").read_bytes() == before


def test_files_in_the_folder_are_replaced_only_when_told(tmp_path, data, capsys):
    path = write(tmp_path / "official.pt", official_state(PUBLISHED, 44), PUBLISHED)
    out = tmp_path / "out"
    assert import_official(capsys, path, "--out", out, "--data", data)[0] == 0
    (out / "dict.txt").write_text("another dictionary")
    before = [(file, file.read_bytes()) for file in sorted(out.iterdir())]
    for flags in ((), ("--data", data)):
        status, _, err = import_official(capsys, path, "--out", out, *flags)
        assert status == 2 and "model.pt exists: give --overwrite to replace it" in err
    (out / "model.pt").unlink()
    status, _, err = import_official(capsys, path, "--out", out, "--data", data)
    assert status == 2 and "dict.txt exists" in err and (out / "dict.txt").read_bytes() == before[0][1]
    assert import_official(capsys, path, "--out", out, "--data", data, "--overwrite")[0] == 0
    assert (out / "dict.txt").read_bytes() == (data / "dict.txt").read_bytes()


def test_bad_files_are_named(tmp_path, data, capsys):
    state = official_state(PUBLISHED, 44)
    write(tmp_path / "object.pt", state, PUBLISHED, extra_state=Unknown())
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": state}, tmp_path / "bare.pt")
    torch.save({"cfg": {"model": PUBLISHED}}, tmp_path / "empty.pt")
    write(tmp_path / "good.pt", official_state(PUBLISHED, 48), PUBLISHED)
    for name, flags, message in (
        ("object.pt", (), "it holds an object of test_import_official.Unknown"),
        ("text.pt", (), "text.pt: "),
        ("bare.pt", (), "no settings of a language model in its 'cfg' or 'args'"),
        ("empty.pt", (), "no weights under 'model'"),
        ("gone.pt", (), "gone.pt) does not exist"),
        ("good.pt", ("--data", data), "44 words with the four special ones, the embedding 48"),
        ("good.pt", ("--data", tmp_path), "no dict.txt in it"),
    ):
        status, _, err = import_official(capsys, tmp_path / name, "--out", tmp_path / "out", *flags)
        assert status == 2 and message in err and err.count("\n") == 1, (name, err)
    assert not (tmp_path / "out").exists()

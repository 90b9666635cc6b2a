"""The YAML files of examples/english_lm/hydra train with the installed fairseq, whichever of the two it is."""

import os

import pytest
import torch
from console import USER_DIR, run_console

from mhmoe_fairseq.models.precision import resolve

MODELS = {
    "dense": {"_name": "dense_lm_tiny", "moe_freq": 0, "dropout": 0.1},
    "xmoe": {"_name": "xmoe_lm_tiny", "mhmoe_heads_number": 1, "mhmoe_router": "xmoe", "moe_expert_count": 8},
    "mhmoe_params": {"_name": "mhmoe_lm_tiny", "mhmoe_heads_number": 4, "mhmoe_budget": "params", "moe_top_k": 2},
    "mhmoe_flops": {"_name": "mhmoe_lm_tiny", "mhmoe_heads_number": 4, "mhmoe_budget": "flops", "moe_top_k": 2},
}


def hydra_train(repository, folder, data, model, *overrides, check=True):
    """Two updates in ``folder``, with relative paths; the log."""
    return run_console(
        "fairseq-hydra-train", "--config-dir", repository / "examples" / "english_lm" / "hydra", "--config-name", "cpu",
        f"model={model}", f"common.user_dir={USER_DIR}", f"task.data={os.path.relpath(data, folder)}",
        "checkpoint.save_dir=saved", "optimization.max_update=2", *overrides, cwd=folder, check=check,
    )  # fmt: skip


def test_every_model_has_a_file(repository):
    files = (repository / "examples" / "english_lm" / "hydra" / "model").glob("*.yaml")
    assert {file.stem for file in files} == set(MODELS)


@pytest.mark.parametrize(
    "model", [*(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "xmoe"), "xmoe"]
)
def test_two_updates(repository, trained_model, tmp_path, model):
    log = hydra_train(repository, tmp_path, trained_model.data, model)
    assert 'num_updates": "2"' in log
    state = torch.load(tmp_path / "saved" / "checkpoint_last.pt", weights_only=True)
    config = state["cfg"]
    assert {name: config["model"][name] for name in MODELS[model]} == MODELS[model]
    assert config["criterion"]["_name"] == "moe_cross_entropy" and config["criterion"]["moe_gate_loss_wt"] == 0.01
    assert list(config["optimizer"]["adam_betas"]) == [0.9, 0.98] or config["optimizer"]["adam_betas"] == "(0.9, 0.98)"
    assert config["task"]["tokens_per_sample"] == 128 and config["optimization"]["max_update"] == 2
    experts = [name for name in state["model"] if "experts.fc1_weight" in name]
    assert len(experts) == (0 if model == "dense" else 2)
    assert state["last_optimizer_state"]["param_groups"][0]["betas"] == (0.9, 0.98)


def test_fields_reach_the_model(repository, trained_model, tmp_path):
    overrides = ("+model.decoder_layers=2", "model.mhmoe_heads_number=2")
    hydra_train(repository, tmp_path, trained_model.data, "mhmoe_params", *overrides)
    state = torch.load(tmp_path / "saved" / "checkpoint_last.pt", weights_only=True)
    assert state["cfg"]["model"]["mhmoe_precision"] == resolve("auto", "cpu")
    experts = {name: value.shape for name, value in state["model"].items() if name.endswith("experts.fc1_weight")}
    assert list(experts) == ["decoder.layers.1.moe_layer.experts.fc1_weight"]
    assert experts.popitem()[1][2] == 128 // 2


@pytest.mark.slow
def test_missing_data_is_named(repository, tmp_path):
    log = hydra_train(repository, tmp_path, tmp_path / "nowhere", "dense", check=False)
    assert any("Error" in line and "nowhere" in line for line in log.splitlines())
    assert not list(tmp_path.glob("saved/*"))

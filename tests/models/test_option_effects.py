"""What every field of the options changes in the built model: its function, its training, its losses, or nothing.

A field without an entry fails. Two models are built that differ in one flag; the second gets the first's parameters as
far as it has them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from beit3_models import beit3_batch, small_beit3
from language_models import small_model, token_rows
from moe_oracle import losses_of
from torch import Tensor, nn

from mhmoe_fairseq.models.options import BEiT3Options, LanguageModelOptions, MoEOptions


class Effect(NamedTuple):
    """What a flag should change.

    Attributes:
        kind: ``function``: results in evaluation; ``training``: results in training only; ``losses``: the auxiliary
            losses only; ``gradients``: these only; ``initial``: initial values only; ``inputs``: which inputs are
            taken; ``nothing``.
        value: a value of the flag.
        other: flags of both models.
        arch: family of both models.
        same_as: flags that do the same as this one.
    """

    kind: str
    value: Any
    other: dict[str, Any] = {}
    arch: str = "mhmoe"
    same_as: dict[str, Any] | None = None


CAPACITY = {"mhmoe_routing": "capacity"}
TIGHT = {**CAPACITY, "moe_eval_capacity_token_fraction": 0.1}
SHARED = {
    "activation_fn": Effect("function", "relu"),
    "dropout": Effect("training", 0.3),
    "attention_dropout": Effect("training", 0.3),
    "activation_dropout": Effect("training", 0.3),
    "no_bias": Effect("function", True),
    "rms_norm": Effect("function", True),
    "subln": Effect("function", True, {"rms_norm": True}),
    "no_subln": Effect("function", True),
    "deepnorm": Effect("function", True),
    "layernorm_embedding": Effect("function", True),
    "checkpoint_activations": Effect("nothing", True, {"dropout": 0.3}),
    "mhmoe_precision": Effect("function", "bf16"),
    "moe_freq": Effect("function", 1),
    "moe_expert_count": Effect("function", 4),
    "moe_top_k": Effect("function", 3),
    "moe_top1_expert": Effect("function", True, same_as={"moe_top_k": 1}),
    "moe_ffn_dim": Effect("function", 24),
    "moe_gating_use_fp32": Effect("function", True, {"mhmoe_precision": "bf16"}),
    "moe_second_expert_policy": Effect("training", "random", CAPACITY),
    "moe_normalize_gate_prob_before_dropping": Effect("function", True, TIGHT),
    "moe_eval_capacity_token_fraction": Effect("function", 0.05, CAPACITY),
    "use_xmoe": Effect("function", True, arch="smoe", same_as={"mhmoe_router": "xmoe"}),
    "mhmoe_heads_number": Effect("function", 2),
    "mhmoe_routing": Effect("function", "capacity"),
    "mhmoe_capacity_factor": Effect("training", 0.5, CAPACITY),
    "mhmoe_router": Effect("function", "linear"),
    "mhmoe_router_preset": Effect("function", "p1"),
    "mhmoe_router_dim": Effect("function", 8),
    "mhmoe_router_normalize": Effect("function", "both"),
    "mhmoe_router_temperature": Effect("function", 0.5),
    "mhmoe_gate_score": Effect("function", "sigmoid"),
    "mhmoe_normalize_gates": Effect("function", "off"),
    "mhmoe_gate_scale": Effect("function", 2.5),
    "mhmoe_expert_groups": Effect("function", 4),
    "mhmoe_kept_groups": Effect("function", 2, {"mhmoe_expert_groups": 4}),
    "mhmoe_group_score": Effect("function", "top2", {"mhmoe_expert_groups": 4}),
    "mhmoe_balancing": Effect("nothing", "quantile"),  # before the first update
    "mhmoe_balancing_rate": Effect("nothing", 0.5, {"mhmoe_balancing": "bias-sign"}),
    "mhmoe_balance_assignment": Effect("losses", "topk"),
    "mhmoe_balance_scope": Effect("losses", "sequence"),
    "mhmoe_expert_parallel_size": Effect("nothing", 1),
    "mhmoe_parallel": Effect("nothing", "heads", {"mhmoe_expert_banks": "per-head"}),  # in one process
    "mhmoe_budget": Effect("function", "flops", {"embed_dim": 128, "ffn_embed_dim": 512, "mhmoe_heads_number": 2}),
    "mhmoe_granularity": Effect("function", 2),
    "mhmoe_latent_dim": Effect("function", 16),
    "mhmoe_expert_banks": Effect("function", "per-head"),
    "mhmoe_router_input": Effect("function", "token", {"mhmoe_heads_number": 1, "mhmoe_latent_dim": 16}),
    "mhmoe_subtoken_residual": Effect("function", True),
    "mhmoe_projection_layers": Effect("function", 2),
    "mhmoe_head_projection": Effect("function", "off"),
    "mhmoe_merge_projection": Effect("function", "off"),
    "mhmoe_merge_norm": Effect("function", True),
    "mhmoe_projection_bias": Effect("function", "on", {"no_bias": True}),
    "mhmoe_projection_gain": Effect("initial", 2.0),
    "mhmoe_no_split": Effect("function", True),
    "mhmoe_shared_expert_dim": Effect("function", 16),
    "mhmoe_quantize": Effect("function", "experts"),
    "mhmoe_shared_experts": Effect("function", 1, arch="smoe"),
    "cpu": Effect("nothing", True),  # fairseq's: on which device --mhmoe-precision auto looks
    "tpu": Effect("nothing", True),  # fairseq's: a task refuses it, since it means --bf16
    "amp": Effect("nothing", True),  # fairseq's: permits fp16 in training
    "fp16": Effect("nothing", True),
}
SIZES = {
    "layers": Effect("function", 3),
    "embed_dim": Effect("function", 48),
    "ffn_embed_dim": Effect("function", 48, arch="dense"),
    "attention_heads": Effect("function", 4),
}
POSITIONS = {"no_token_positional_embeddings": True}
OWN = {
    "decoder": {
        **{f"decoder_{name}": effect for name, effect in SIZES.items()},
        "no_scale_embedding": Effect("function", True),
        "no_token_positional_embeddings": Effect("function", True),
        "decoder_learned_pos": Effect("function", True),
        "rotary_embed": Effect("function", True, POSITIONS),
        "xpos_rel_pos": Effect("function", True, POSITIONS),
        "no_share_decoder_input_output_embed": Effect("gradients", True),
        "share_decoder_input_output_embed": Effect("nothing", True),
        "mhmoe_segment_length": Effect("function", 3, {"mhmoe_routing": "lory"}, arch="smoe"),
        "max_target_positions": Effect("nothing", 8),  # the longest row; learned positions are as many
        "tokens_per_sample": Effect("nothing", 8),
    },
    "encoder": {
        **{f"encoder_{name}": effect for name, effect in SIZES.items()},
        "drop_path_rate": Effect("training", 0.5),
        "mhmoe_modality_experts": Effect("function", "separate"),
        "patch_size": Effect("function", 2),
        "img_size": Effect("inputs", 12),
        "max_text_length": Effect("inputs", 4),
    },
}
OPTIONS = {"decoder": LanguageModelOptions, "encoder": BEiT3Options}
CASES = [(stack, name) for stack in OWN for name in (*SHARED, *OWN[stack])]


class Results(NamedTuple):
    """Of a model on one batch."""

    evaluated: Tensor
    trained: Tensor
    losses: Tensor
    gradient: Tensor


def build(stack: str, arch: str, flags: dict[str, Any]) -> nn.Module:
    flags = {f"{stack}_{name}" if name in SIZES else name: value for name, value in flags.items()}
    return small_model(f"{arch}_lm_tiny", **flags) if stack == "decoder" else small_beit3(f"{arch}_beit3_tiny", **flags)


@functools.cache
def plain_model(stack: str, arch: str, other: tuple) -> tuple[nn.Module, Results]:
    model = build(stack, arch, dict(other))
    return model, results(stack, model)


def results(stack: str, model: nn.Module) -> Results:
    batch = {"src_tokens": token_rows([8, 6, 8])}
    if stack == "encoder":
        batch = beit3_batch("pair", [7, 5, 7])
        batch["images"] = batch["images"].float()
    evaluated, extra = model.eval()(**batch)
    torch.manual_seed(5)
    trained, trained_extra = model.train()(**batch)
    model.zero_grad()
    trained.float().square().sum().backward()
    gradient = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    losses = losses_of(extra)
    return Results(evaluated.detach(), trained.detach(), losses.detach(), gradient)


def with_flags(stack: str, effect: Effect, flags: dict[str, Any], plain: nn.Module) -> nn.Module:
    """Another model, with the plain one's parameters as far as both have them."""
    model = build(stack, effect.arch, {**effect.other, **flags})
    own, state = model.state_dict(), plain.state_dict()
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return model


def alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("stack, name", CASES)
def test_a_flag_changes_what_it_should_and_no_more(stack, name):
    effect = {**SHARED, **OWN[stack]}[name]
    plain, before = plain_model(stack, effect.arch, tuple(effect.other.items()))
    changed = with_flags(stack, effect, {name: effect.value}, plain)
    if effect.kind == "inputs":
        with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
            results(stack, changed)
        return
    after = results(stack, changed)
    assert alike(before.evaluated, after.evaluated) == (effect.kind != "function")
    if effect.kind != "function":
        assert alike(before.trained, after.trained) == (effect.kind != "training")
        assert alike(before.losses, after.losses) == (effect.kind != "losses")
    if effect.kind in ("nothing", "gradients", "initial"):
        assert alike(before.gradient, after.gradient) == (effect.kind != "gradients")
    if effect.kind == "initial":
        fresh = build(stack, effect.arch, {**effect.other, name: effect.value})
        assert not all(map(alike, plain.state_dict().values(), fresh.state_dict().values()))
    if effect.same_as is not None:
        expected = results(stack, with_flags(stack, effect, effect.same_as, plain))
        assert all(alike(one, other) for one, other in zip(after, expected))


# Seen here otherwise than said: rounding; training capacity in evaluation where the fraction is negative; one process;
# no updates; rows as long as the limit.
OTHERWISE = {
    "mhmoe_precision", "mhmoe_capacity_factor", "mhmoe_balancing", "mhmoe_balancing_rate",
    "max_target_positions", "tokens_per_sample",
}  # fmt: skip
SAID = {"losses": "training", "initial": "training", "gradients": "function", "inputs": "function"}


@pytest.mark.parametrize("stack", OWN)
def test_every_field_has_an_entry_and_says_what_it_affects(stack):
    effects = {**SHARED, **OWN[stack]}
    fields = {field.name: field.metadata for field in dataclasses.fields(OPTIONS[stack]) if field.name != "_name"}
    assert fields.keys() == effects.keys()
    assert {field.name for field in dataclasses.fields(MoEOptions)} - {"_name"} == set(SHARED)
    for name in fields.keys() - OTHERWISE:
        assert fields[name]["affects"] == SAID.get(effects[name].kind, effects[name].kind), name

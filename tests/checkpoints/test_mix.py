"""Branch-Train-MiX: equal branches compute what their seed computes, whatever the new router says; others are kept."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from dense_checkpoints import write_dense
from language_models import small_dictionary, token_rows

from mhmoe_fairseq.checkpoints.mix import mix
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.models.architectures import named_architecture
from mhmoe_fairseq.models.language_model import build_language_model
from mhmoe_fairseq.models.options import LanguageModelOptions

VARIANTS = {
    "sub-LN": {},
    "plain": {"no_subln": True},
    "SwiGLU without biases, RMSNorm": {"activation_fn": "silu", "no_bias": True, "rms_norm": True},
    "SwiGLU with biases, sub-LN": {"activation_fn": "silu"},
    "deepnorm, relu": {"deepnorm": True, "activation_fn": "relu"},
    "1.58 bits": {"mhmoe_quantize": "all"},
    "untied, learned positions": {"no_share_decoder_input_output_embed": True, "decoder_learned_pos": True},
}


def built(checkpoint: dict):
    """The model of a checkpoint, in evaluation mode."""
    stored = checkpoint["cfg"]["model"]
    options = LanguageModelOptions.from_namespace(Namespace(**stored))
    named_architecture(stored["_name"])(options)
    model = build_language_model(options, small_dictionary())
    model.load_state_dict(checkpoint["model"], strict=True)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_rows([9, 6]))[0][token_rows([9, 6]).ne(1)]


@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_equal_branches_give_the_seeds_logits_under_any_router(tmp_path: Path, flags: dict, freq: int) -> None:
    seed = write_dense(tmp_path / "seed.pt", **flags)
    expected = logits(built(torch.load(seed)))
    for router_seed in (1, 2):
        model = built(mix(seed, [seed] * 3, moe_freq=freq, router_seed=router_seed))
        assert [layer.is_moe_layer for layer in model.decoder.layers] == [freq == 1, True]
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_each_branch_is_an_expert_and_all_else_is_the_mean(tmp_path: Path) -> None:
    seed, *branches = (write_dense(tmp_path / f"{number}.pt", number) for number in range(4))
    states = [torch.load(path)["model"] for path in branches]
    mixed = mix(seed, branches, moe_freq=2)
    model, origin = mixed["model"], mixed["mixed_from"]
    ffn, experts = "decoder.layers.1.ffn.", "decoder.layers.1.moe_layer.experts."
    pairs = {"fc1.weight": "fc1_weight", "fc1.bias": "fc1_bias", "fc2.weight": "fc2_weight", "fc2.bias": "fc2_bias",
             "ffn_layernorm.weight": "layernorm_weight", "ffn_layernorm.bias": "layernorm_bias"}  # fmt: skip
    for name, stacked in pairs.items():
        assert torch.equal(model[experts + stacked], torch.stack([state[ffn + name] for state in states]))
    for name in (
        "decoder.layers.0.ffn.fc1.weight",
        "decoder.layers.1.self_attn.q_proj.weight",
        "decoder.layer_norm.bias",
    ):
        mean = torch.stack([state[name] for state in states]).double().mean(0).float()
        torch.testing.assert_close(model[name], mean, atol=0, rtol=1e-6)
    assert model["decoder.embed_tokens.weight"] is model["decoder.output_projection.weight"]
    router = model["decoder.layers.1.moe_layer.router.weight"]
    assert router.shape == (3, 32) and 0.05 < router.std() * 32**0.5 * 3**0.5 < 1.5 and len(router.unique()) == 96
    assert [len(origin["branches"]), origin["moe_freq"], origin["moe_top_k"]] == [3, 2, 2]
    assert mixed["cfg"]["model"]["_name"] == "smoe_lm_tiny" and "last_optimizer_state" not in mixed


def test_routers_are_drawn_from_their_seed_and_nothing_else(tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed.pt")
    name = "decoder.layers.{}.moe_layer.router.weight"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (mix(seed, [seed] * 2, router_seed=number)["model"] for number in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[name.format(0)], again[name.format(0)])
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])


def test_what_cannot_be_mixed_is_refused_by_one_line(tmp_path: Path) -> None:
    seed = write_dense(tmp_path / "seed.pt")
    with pytest.raises(UserError, match=r"--moe-top-k \(1\) must be at least 2: .*raw probability"):
        mix(seed, [seed] * 2, top_k=1)
    with pytest.raises(UserError, match=r"--branch: 1 of them cannot be --moe-top-k \(2\)"):
        mix(seed, [seed])
    with pytest.raises(UserError, match=r"--moe-freq \(3\) must be at least 1 and at most the model's 2 layers"):
        mix(seed, [seed] * 2, moe_freq=3)
    wider = write_dense(tmp_path / "wider.pt", decoder_ffn_embed_dim=96)
    with pytest.raises(UserError, match=r"wider.pt is not the model of .*seed.pt: --decoder-ffn-embed-dim is 96 in it"):
        mix(seed, [seed, wider])
    torch.save({**torch.load(wider), "cfg": torch.load(seed)["cfg"]}, wider)
    with pytest.raises(UserError, match=r"wider.pt .*: decoder.layers.0.ffn.fc1.bias is \(96,\) in it, \(64,\) there"):
        mix(seed, [seed, wider])
    other = write_dense(tmp_path / "other.pt", words=41)
    with pytest.raises(UserError, match="other.pt is not the model of .*: it has another dictionary"):
        mix(seed, [seed, other])
    sparse = write_dense(tmp_path / "sparse.pt", arch="smoe_lm_tiny")
    with pytest.raises(UserError, match=r"sparse.pt is not the model of .*--arch is smoe_lm_tiny in it"):
        mix(seed, [seed, sparse])
    with pytest.raises(UserError, match=r"--seed .*sparse.pt: its --arch \(smoe_lm_tiny\) must be a dense"):
        mix(sparse, [sparse] * 2)
    norms = write_dense(tmp_path / "norms.pt", rms_norm=True, subln=True)
    with pytest.raises(UserError, match=r"--seed .*norms.pt: was trained with --rms-norm and --subln"):
        mix(norms, [norms] * 2)

"""The fairseq model of images and text: heads, precision, and which checkpoints it takes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from beit3_models import IMAGES, SMALL, beit3_batch, beit3_dictionary, small_beit3
from fairseq.data import Dictionary
from moe_oracle import losses_of
from torch import nn

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import MHMoEBEiT3, resize_image_positions
from mhmoe_fairseq.models.flags import encoder_settings, moe_config

A = "beit3.encoder.embed_positions.A.weight"
B = "beit3.encoder.embed_positions.B.weight"


class FirstPosition(nn.Linear):
    """A head: scores from the class position; keeps what it was called with."""

    def forward(self, features, extra):
        self.extra = extra
        return super().forward(features[:, 0])


def task(**changes):
    return SimpleNamespace(**{"source_dictionary": beit3_dictionary(), "num_visual_tokens": 6, **changes})


def options(arch="mhmoe_beit3_tiny", **flags):
    return architecture_options(arch, **{**SMALL, **IMAGES, "mhmoe_budget": "none", "dropout": 0.0, **flags})


def single(batch):
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


# ---------------------------------------------------------------------- building


@pytest.mark.parametrize("family", ["dense", "smoe", "xmoe", "mhmoe"])
@pytest.mark.parametrize("size, layers", [("tiny", 4), ("base", 12)])
def test_every_architecture_builds_without_memory(family, size, layers):
    with torch.device("meta"):
        model = MHMoEBEiT3.build_model(architecture_options(f"{family}_beit3_{size}"), task())
    assert all(parameter.is_meta for parameter in model.parameters())
    flags = [layer.is_moe_layer for layer in model.beit3.encoder.layers]
    assert flags == ([False] * layers if family == "dense" else [False, True] * (layers // 2))
    for layer in model.beit3.encoder.layers:
        if layer.is_moe_layer:
            assert sum(p.numel() for p in layer.moe_layer.parameters()) == layer.moe_layer.config.num_params()


def test_the_budget_spends_xmoes_parameters_on_heads():
    xmoe, mhmoe = (moe_config(architecture_options(f"{family}_beit3_base")) for family in ("xmoe", "mhmoe"))
    assert (mhmoe.num_heads, mhmoe.num_experts, mhmoe.expert_ffn_dim) == (4, 8, 11832)
    assert 0.995 * xmoe.num_params() <= mhmoe.num_params() <= xmoe.num_params()
    flops = moe_config(architecture_options("mhmoe_beit3_base", mhmoe_budget="flops"))
    assert flops.flops_per_token() == pytest.approx(xmoe.flops_per_token(), rel=0.005)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"patch_size": 3}, r"--patch-size \(3\) must divide --img-size \(8\)"),
        ({"max_text_length": 0}, r"--max-text-length \(0\) must be at least 3"),
        ({"drop_path_rate": 1.0}, r"--drop-path-rate \(1.0\) must be in \[0, 1\)"),
        ({"encoder_attention_heads": 5}, r"--encoder-attention-heads \(5\) must divide --encoder-embed-dim \(32\)"),
        ({"mhmoe_heads_number": 5}, r"--mhmoe-heads-number \(5\) must divide --encoder-embed-dim \(32\)"),
        ({"moe_freq": 3}, r"--moe-freq \(3\) must be 0 or at most --encoder-layers \(2\)"),
        ({"mhmoe_routing": "torchscale", "mhmoe_heads_number": 1}, "--mhmoe-routing torchscale is for language models"),
    ],
)
def test_impossible_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        encoder_settings(options(**flags), vocab_size=50)


def test_pools_for_each_modality_need_experts():
    with pytest.raises(ValueError, match="--mhmoe-modality-experts needs MoE layers, but the model is dense"):
        small_beit3("dense_beit3_tiny", mhmoe_modality_experts="separate")


def test_building_from_a_task():
    model = MHMoEBEiT3.build_model(options(), task())
    assert model.image_head.out_features == 6 and model.text_head.out_features == len(beit3_dictionary())
    with pytest.raises(ValueError, match="has no <mask>: make dict.txt with mhmoe prepare image-text"):
        MHMoEBEiT3.build_model(options(), task(source_dictionary=Dictionary()))
    with pytest.raises(ValueError, match="--tpu"):
        MHMoEBEiT3.build_model(options(tpu=True), task())
    bare = options()
    bare.encoder_layers = None
    with pytest.raises(ValueError, match="needs an architecture, such as mhmoe_beit3_tiny"):
        MHMoEBEiT3.build_model(bare, task())


# ---------------------------------------------------------------------- calling


def test_scores_of_words_and_visual_tokens():
    model = small_beit3().double().eval()
    features, extra = model(**beit3_batch("pair", [5, 3], masked=True))
    split = extra["image_positions"]
    assert model.image_logits(features[:, 1:split]).shape == (2, 4, 6)
    assert model.text_logits(features[:, split:][extra["padding_mask"][:, split:]]).shape == (2, len(model.dictionary))
    assert model.text_head.weight is not model.beit3.text_embed.weight
    with pytest.raises(ValueError, match="no head for masked patches"):
        small_beit3(num_visual_tokens=0).image_logits(features)


def test_a_registered_head_gets_features_and_extra():
    model = small_beit3().double()
    model.register_head("first", FirstPosition(32, 3).double())
    result, extra = model(**beit3_batch("pair", [5, 3]), head="first")
    assert result.shape == (2, 3) and model.heads["first"].extra is extra
    result.sum().backward()
    assert model.heads["first"].weight.grad.any() and losses_of(extra).shape == (1, 2)
    with pytest.raises(KeyError, match="second"):
        model(**beit3_batch("pair", [5, 3]), head="second")


@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_says_whether_it_reads_features_after_the_last_norm(normalize):
    model = small_beit3().double().eval()
    head = FirstPosition(32, 3).double()
    head.normalize_output = normalize
    model.register_head("first", head)
    batch = beit3_batch("pair", [5, 3])
    features, extra = model.beit3(**batch, normalize_output=normalize)
    torch.testing.assert_close(model(**batch, head="first")[0], head(features, extra))


def test_bad_inputs_are_named():
    model = small_beit3().double()
    with pytest.raises(ValueError, match="text_tokens or images: give one, or both"):
        model()
    with pytest.raises(ValueError, match="an image of 16x16 pixels; the model's --img-size is 8"):
        model(**beit3_batch("image", [1], size=16))


def test_half_precision_and_its_rule():
    exact = small_beit3().eval()
    half = small_beit3(mhmoe_precision="bf16").eval()
    batch = single(beit3_batch("pair", [5, 3]))
    (expected, _), (actual, _) = exact(**batch), half(**batch)
    scores = half.text_logits(actual)
    assert scores.dtype == torch.bfloat16
    assert 0 < (scores - exact.text_logits(expected)).abs().max() < 0.1
    with pytest.raises(ValueError, match="training in fp16 needs loss scaling"):
        small_beit3(mhmoe_precision="fp16").train()(**batch)
    small_beit3(mhmoe_precision="bf16").train()(**batch)[0].float().sum().backward()


# ---------------------------------------------------------------------- checkpoints


def test_a_state_is_taken_whole_or_not_at_all():
    state = small_beit3(seed=1).state_dict()
    model = small_beit3()
    model.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for change, message in (
        ({"beit3.text_embed.weight": None}, "Missing key.*beit3.text_embed.weight"),
        ({"image_head.bias": None}, "Missing key.*image_head.bias"),
        ({"beit3.strange": torch.ones(1)}, "Unexpected key.*beit3.strange"),
        ({"heads.vqa.weight": torch.ones(1)}, "Unexpected key.*heads.vqa.weight"),
        ({"image_head.weight": torch.ones(7, 32)}, "size mismatch for image_head.weight"),
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(changed)


def test_names_are_those_of_unilms_beit3():
    names = set(small_beit3("dense_beit3_tiny").state_dict())
    assert {
        "beit3.text_embed.weight",
        "beit3.vision_embed.cls_token",
        "beit3.encoder.embed_positions.A.weight",
        "beit3.encoder.layers.0.self_attn.q_proj.B.weight",
        "beit3.encoder.layers.0.ffn.A.ffn_layernorm.weight",
        "beit3.encoder.layer_norm.A.weight",
    } <= names


def test_another_dictionary_is_refused():
    state = small_beit3().state_dict()
    assert state["vocabulary_fingerprint"].shape == (4,)
    other = Dictionary()
    for number in reversed(range(40)):
        other.add_symbol(f"w{number}")
    other.add_symbol("<mask>")
    with pytest.raises(ValueError, match=r"the checkpoint's dictionary \(45 words\) is not this data's dict.txt \(45"):
        small_beit3(dictionary=other).load_state_dict(state)


def test_a_checkpoint_of_pretraining_in_fine_tuning(caplog):
    state = small_beit3(seed=1).state_dict()
    model = small_beit3(num_visual_tokens=0)
    model.register_head("answers", FirstPosition(32, 3))
    initial = model.heads["answers"].weight.clone()
    with caplog.at_level(logging.INFO):
        model.load_state_dict(state)
    assert "the checkpoint has no head 'answers': it starts from its initial weights" in caplog.text
    assert torch.equal(model.heads["answers"].weight, initial)
    assert torch.equal(model.text_head.weight, state["text_head.weight"])
    assert "image_head.weight" in state  # the caller's dictionary stays as it is

    later = small_beit3(num_visual_tokens=0)
    later.register_head("answers", FirstPosition(32, 3), may_be_new=False)
    with pytest.raises(RuntimeError, match="Missing key.*heads.answers.weight"):
        later.load_state_dict(state)
    later.load_state_dict(model.state_dict())
    assert torch.equal(later.heads["answers"].weight, initial)
    half_there = {**model.state_dict()}
    del half_there["heads.answers.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*heads.answers.bias"):
        model.load_state_dict(half_there)


def test_a_checkpoint_of_another_task(caplog):
    before = small_beit3(seed=1, num_visual_tokens=0)
    before.register_head("answers", FirstPosition(32, 3))
    state = before.state_dict()
    model = small_beit3(num_visual_tokens=0)
    model.register_head("statements", FirstPosition(32, 2))
    with pytest.raises(RuntimeError, match="Unexpected key.*heads.answers"):
        model.load_state_dict(state)
    model.heads.leaves_out_others = True
    initial = model.heads["statements"].weight.clone()
    with caplog.at_level(logging.INFO):
        model.load_state_dict(state)
    assert "the checkpoint's head 'answers' is another task's: it is left out" in caplog.text
    assert torch.equal(model.heads["statements"].weight, initial)
    assert torch.equal(model.beit3.text_embed.weight, state["beit3.text_embed.weight"])
    assert "heads.answers.weight" in state

    captioning = small_beit3(num_visual_tokens=0)  # has no head of its own
    captioning.heads.leaves_out_others = True
    captioning.load_state_dict(state)
    assert torch.equal(captioning.beit3.text_embed.weight, state["beit3.text_embed.weight"])


def test_images_of_another_size(caplog):
    saved = small_beit3(seed=1)
    larger = small_beit3(img_size=16, num_visual_tokens=0)
    with caplog.at_level(logging.INFO):
        larger.load_state_dict(saved.state_dict())
    assert "positions of 2x2 patches are resized to 4x4 (--img-size)" in caplog.text
    before, after = saved.get_parameter(A), larger.get_parameter(A)
    assert after.shape == (3 + 16, 32) and torch.equal(after[:3], before[:3])
    middle = after[3:].view(4, 4, 32).mean((0, 1))
    torch.testing.assert_close(middle, before[3:].mean(0), rtol=0, atol=1e-6)
    assert larger.double()(**beit3_batch("pair", [3], size=16))[0].isfinite().all()

    fitted = larger.fitted_state(saved.state_dict())
    assert fitted.keys() == larger.state_dict().keys()
    assert all(fitted[name].shape == value.shape for name, value in larger.state_dict().items())


def test_resizing_bicubically():
    torch.manual_seed(0)
    table = torch.randn(3 + 9, 5)
    assert resize_image_positions(table, 12) is table
    grid = nn.functional.interpolate(
        table[3:].view(1, 3, 3, 5).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic", align_corners=False
    )
    expected = grid.permute(0, 2, 3, 1).reshape(36, 5)
    torch.testing.assert_close(resize_image_positions(table, 39)[3:], expected)
    with pytest.raises(ValueError, match="11 rows are not the positions of a square of patches"):
        resize_image_positions(table[:11], 39)


def test_texts_of_another_length():
    state = small_beit3(seed=1).state_dict()
    shorter = small_beit3(max_text_length=5)
    shorter.load_state_dict(state)
    assert torch.equal(shorter.get_parameter(B), state[B][:7])
    with pytest.raises(ValueError, match=r"--max-text-length \(20\): the checkpoint has positions for 12 tokens only"):
        small_beit3(max_text_length=20).load_state_dict(state)

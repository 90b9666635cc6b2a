"""BEiT-3's encoder against a slow reference, and what batches, padding and recomputation must not change."""

import random

import beit3_oracle
import pytest
import torch
from beit3_models import FAMILIES, IMAGE_POSITIONS, KINDS, beit3_batch, small_beit3
from moe_oracle import losses_of

from mhmoe_fairseq.moe import MHMoELayer, RoutingStats

TINY = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 12}
FULL_AND_CAPTION = ("full", "caption")


def real(extra, features):
    """Features of the positions that are not padded, ``(positions, D)``."""
    mask = extra["padding_mask"]
    return features.flatten(0, 1) if mask is None else features[~mask]


def weighted(values):
    """A sum whose gradient differs from place to place."""
    return (values * torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)).sum()


# ---------------------------------------------------------------------- the slow reference


@pytest.mark.parametrize("attention", FULL_AND_CAPTION)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arch, flags",
    [
        ("dense_beit3_tiny", {}),
        ("xmoe_beit3_tiny", {"no_subln": True}),
        ("mhmoe_beit3_tiny", {}),
        ("mhmoe_beit3_tiny", {"mhmoe_modality_experts": "separate"}),
    ],
    ids=lambda value: (
        "-".join(value.values()) if isinstance(value, dict) and "mhmoe_modality_experts" in value else None
    ),
)
def test_positions_one_by_one(arch, flags, kind, attention):
    model = small_beit3(arch, **TINY, **flags).double().eval()
    batch = beit3_batch(kind, [4, 2], masked=True)
    results = []
    for encode in (ours, slow):
        model.zero_grad()
        values, losses = encode(model, batch, attention)
        (weighted(values) + weighted(losses)).backward()
        results.append((values, losses, {name: p.grad for name, p in model.named_parameters()}))
    (values, losses, gradients), (slow_values, slow_losses, slow_gradients) = results
    torch.testing.assert_close(values, slow_values, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses, slow_losses, rtol=1e-6, atol=1e-9)
    for name, expected in slow_gradients.items():
        actual = gradients[name]
        if expected is None:  # a modality, or expert pool, that the batch does not reach
            assert actual is None or not actual.any(), name
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def ours(model, batch, attention):
    features, extra = model(**batch, attention=attention)
    return real(extra, features), losses_of(extra).double()


def slow(model, batch, attention):
    rows, losses = beit3_oracle.encode(model.beit3, **batch, attention=attention)
    values = torch.stack([x for row in rows for x in row if x is not None])
    return values, torch.stack(losses) if losses else torch.zeros(1, 2, dtype=torch.double)


# ---------------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_any_kind_equals_its_rows_one_by_one(seed):
    choose = random.Random(seed)
    arch = f"{choose.choice(FAMILIES)}_beit3_tiny"
    flags = {"encoder_layers": choose.choice([1, 2, 3]), "moe_freq": 1} if not arch.startswith("dense") else {}
    if flags and choose.random() < 0.5:
        flags["mhmoe_modality_experts"] = "separate"
    model = small_beit3(arch, seed=seed, **flags).double().eval()
    kind, attention = choose.choice(KINDS), choose.choice(FULL_AND_CAPTION)
    lengths = [choose.randint(1, 9) for _ in range(choose.randint(1, 4))]
    batch = beit3_batch(kind, lengths, seed=seed, masked=choose.random() < 0.5)
    features, extra = model(**batch, attention=attention)
    split = 0 if kind == "text" else IMAGE_POSITIONS
    assert extra["image_positions"] == split
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        if kind != "image":
            alone["text_tokens"] = alone["text_tokens"][:, :length]
        expected, _ = model(**alone, attention=attention)
        actual = features[row : row + 1, : expected.size(1)]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("experts", ["shared", "separate"])
@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("kind", ["text", "pair"])
@pytest.mark.parametrize("attention", FULL_AND_CAPTION)
def test_padding_changes_nothing(kind, routing, experts, attention):
    model = small_beit3(mhmoe_routing=routing, mhmoe_modality_experts=experts).eval()
    batch = {name: value.float() if name == "images" else value for name, value in beit3_batch(kind, [5, 3]).items()}
    features, extra = model(**batch, attention=attention)
    longer = {**batch, "text_tokens": torch.nn.functional.pad(batch["text_tokens"], (0, 6), value=1)}
    padded, padded_extra = model(**longer, attention=attention)
    torch.testing.assert_close(real(padded_extra, padded), real(extra, features), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses_of(padded_extra), losses_of(extra), rtol=0, atol=1e-5)
    assert torch.equal(padded_extra["moe"][1].stats.expert_load, extra["moe"][1].stats.expert_load)


def test_padding_is_never_routed():
    model = small_beit3()
    for kind, positions in (("image", 2 * IMAGE_POSITIONS), ("text", 8), ("pair", 2 * IMAGE_POSITIONS + 8)):
        _, extra = model.double()(**beit3_batch(kind, [5, 3]))
        stats = extra["moe"][1].stats
        assert stats.num_subtokens == positions * 4  # heads
        assert stats.expert_load.sum() == positions * 4 * 2  # top-k


@pytest.mark.parametrize("attention", FULL_AND_CAPTION)
@pytest.mark.parametrize("kind", ["text", "pair"])
@pytest.mark.parametrize("experts", ["shared", "separate"])
def test_rows_of_padding_only_are_finite(kind, attention, experts):
    model = small_beit3(mhmoe_modality_experts=experts).double()
    batch = beit3_batch(kind, [4, 3, 2])
    batch["text_tokens"][1:] = 1
    features, extra = model(**batch, attention=attention)
    assert features.isfinite().all()
    (real(extra, features).square().sum() + losses_of(extra).sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    first = {name: value[:1] for name, value in batch.items()}
    torch.testing.assert_close(features[:1], model(**first, attention=attention)[0])


def test_a_batch_of_nothing_but_padding_is_finite():
    model = small_beit3().double()
    features, extra = model(text_tokens=torch.ones(2, 3, dtype=torch.long))
    assert features.isfinite().all() and losses_of(extra).tolist() == [[0.0, 0.0]]


# ---------------------------------------------------------------------- what the parts are


def test_extras_have_one_entry_per_layer():
    model = small_beit3(encoder_layers=4).double()
    _, extra = model(**beit3_batch("pair", [5, 3]))
    assert [output is None for output in extra["moe"]] == [True, False, True, False]
    assert losses_of(extra).requires_grad and extra["moe"][1].hidden.numel() == 0
    assert isinstance(extra["moe"][3].stats, RoutingStats) and extra["moe"][3].traffic is None
    assert extra["padding_mask"].tolist()[1] == [False] * (IMAGE_POSITIONS + 3) + [True] * 2


def test_one_pool_for_both_modalities_or_one_for_each():
    shared, separate = small_beit3(), small_beit3(mhmoe_modality_experts="separate")
    layer = shared.beit3.encoder.layers[1]
    assert isinstance(layer.moe_layer, MHMoELayer) and not hasattr(layer, "ffn")
    names = {name for name, _ in separate.beit3.encoder.layers[1].moe_layer.named_parameters()}
    assert {"A.experts.fc1_weight", "B.experts.fc1_weight", "A.router.reduction.weight"} <= names
    for kind, idle in (("image", 1), ("text", 0)):
        _, extra = separate.double()(**beit3_batch(kind, [5, 3]))
        assert extra["moe"][1].stats.expert_load.shape == (2, 8)
        assert not extra["moe"][1].stats.expert_load[idle].any()
    _, extra = separate(**beit3_batch("pair", [5, 3]))
    load = extra["moe"][1].stats.expert_load
    assert load[0].sum() == 2 * IMAGE_POSITIONS * 8 and load[1].sum() == 8 * 8


def test_the_pool_without_positions_is_called_and_gets_zero_gradients():
    model = small_beit3(mhmoe_modality_experts="separate").double()
    features, extra = model(**beit3_batch("image", [1, 1]))
    (features.square().sum() + losses_of(extra).sum()).backward()
    pools = model.beit3.encoder.layers[1].moe_layer
    assert pools.A.experts.fc1_weight.grad.any()
    assert pools.B.experts.fc1_weight.grad is not None and not pools.B.experts.fc1_weight.grad.any()


def test_the_mask_token_replaces_masked_patches():
    model = small_beit3().double().eval()
    batch = beit3_batch("pair", [3, 3])
    batch["masked_patches"] = torch.tensor([[True, False, False, False]] * 2)
    features, _ = model(**batch)
    painted = batch["images"].clone()
    painted[:, :, :4, :4] = 5.0  # the first patch
    torch.testing.assert_close(model(**{**batch, "images": painted})[0], features)
    painted[:, :, :4, 4:] = 5.0  # the second one, too
    assert not torch.allclose(model(**{**batch, "images": painted})[0], features)


def test_the_longest_text_has_positions_of_its_own():
    model = small_beit3().double().eval()  # --max-text-length 12
    tokens = torch.full((1, 12), 7)
    features, _ = model(text_tokens=tokens)
    assert len({tuple(vector) for vector in features[0].tolist()}) == 12
    with pytest.raises(ValueError, match="a text of 13 tokens; --max-text-length is 12"):
        model(text_tokens=torch.full((1, 13), 7))


def test_recomputation_knows_each_calls_modalities():
    """Three calls before one backward: a split kept in the modules would be that of the last call."""
    results = []
    for checkpointed in (False, True):
        model = small_beit3(checkpoint_activations=checkpointed, dropout=0.1, drop_path_rate=0.2).double().train()
        torch.manual_seed(3)
        total = 0.0
        for kind in KINDS:
            features, extra = model(**beit3_batch(kind, [5, 3]))
            total = total + weighted(features) + losses_of(extra).sum()
        total.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 60
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_recomputation_runs_layers_again_in_training_only():
    model = small_beit3(checkpoint_activations=True).double().train()
    runs = []
    model.beit3.encoder.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    features, _ = model(**beit3_batch("pair", [3]))
    features.sum().backward()
    assert len(runs) == 2
    model.eval()(**beit3_batch("pair", [3]))[0].sum().backward()
    assert len(runs) == 3


def test_features_before_the_final_norm():
    model = small_beit3().double().eval()
    batch = beit3_batch("pair", [3])
    plain, extra = model.beit3(**batch, normalize_output=False)
    normed, _ = model.beit3(**batch)
    torch.testing.assert_close(model.beit3.encoder.layer_norm(plain, extra["image_positions"]), normed)
    assert not torch.allclose(plain, normed)


@pytest.mark.parametrize(
    "flags",
    [
        {"deepnorm": True},
        {"rms_norm": True, "no_bias": True, "activation_fn": "silu"},
        {"rms_norm": True, "subln": True},
        {"layernorm_embedding": True, "activation_fn": "relu"},
    ],
    ids=str,
)
def test_other_transformers(flags):
    model = small_beit3(**flags).double()
    features, extra = model(**beit3_batch("pair", [5, 3]))
    (weighted(features) + losses_of(extra).sum()).backward()
    missing = [name for name, p in model.beit3.named_parameters() if p.grad is None]
    assert missing == ["vision_embed.mask_token"]
    encoder = model.beit3.encoder
    if flags.get("no_bias"):
        assert not [n for n, _ in encoder.named_parameters() if n.endswith("bias") and "norm" not in n]
    if flags.get("rms_norm"):
        assert isinstance(encoder.layers[0].self_attn_layer_norm.B, torch.nn.RMSNorm)
    assert encoder.layers[0].normalize_before != bool(flags.get("deepnorm"))

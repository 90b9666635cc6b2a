"""Named architectures: the paper's counts, sizes, and filling what is open."""

import argparse

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY
from language_models import FAMILIES, small_dictionary

from mhmoe_fairseq.models.architectures import KINDS, architecture_options
from mhmoe_fairseq.models.flags import moe_config
from mhmoe_fairseq.models.language_model import build_language_model

SIZES = ("tiny", "small", "base")


def meta_model(arch, dictionary=None, **flags):
    with torch.device("meta"):
        return build_language_model(architecture_options(arch, **flags), dictionary or small_dictionary())


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def paper_vocabulary():
    dictionary = small_dictionary(100_277 - 4)
    assert len(dictionary) == 100_277
    return dictionary


def test_dense_base_has_the_papers_162_million(paper_vocabulary):
    assert count(meta_model("dense_lm_base", paper_vocabulary)) == 162_160_896


@pytest.mark.parametrize(
    "experts, millions", [(8, 361), (16, 588), (32, 1_042), (64, 1_949), (128, 3_765), (256, 7_397)]
)
def test_xmoe_and_mhmoe_base_have_the_counts_of_table_11(experts, millions, paper_vocabulary):
    xmoe = count(meta_model("xmoe_lm_base", paper_vocabulary, moe_expert_count=experts))
    mhmoe = count(meta_model("mhmoe_lm_base", paper_vocabulary, moe_expert_count=experts))
    assert abs(xmoe / 1e6 - millions) < 1
    assert 0.995 * xmoe <= mhmoe <= xmoe


@pytest.mark.parametrize("arch", [f"{family}_lm_{size}" for family in FAMILIES for size in SIZES])
def test_every_architecture_builds_without_memory(arch):
    model = meta_model(arch)
    assert all(parameter.is_meta for parameter in model.parameters())
    moe_layers = [layer for layer in model.decoder.layers if layer.is_moe_layer]
    assert len(moe_layers) == (0 if arch.startswith("dense") else len(model.decoder.layers) // 2)
    for layer in moe_layers:
        assert sum(p.numel() for p in layer.moe_layer.parameters()) == layer.moe_layer.config.num_params()


@pytest.mark.parametrize(
    "stack, size, sizes",
    [
        ("decoder", "tiny", (4, 128, 4, 512)),
        ("decoder", "small", (6, 256, 8, 1024)),
        ("decoder", "base", (12, 768, 12, 3072)),
        ("encoder", "tiny", (4, 128, 4, 512)),
        ("encoder", "base", (12, 768, 12, 3072)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_defaults(family, stack, size, sizes):
    options = architecture_options(f"{family}_{'lm' if stack == 'decoder' else 'beit3'}_{size}")
    names = ("layers", "embed_dim", "attention_heads", "ffn_embed_dim")
    assert tuple(getattr(options, f"{stack}_{name}") for name in names) == sizes
    assert (options.activation_fn, options.dropout) == ("gelu", 0.1)
    assert options.attention_dropout == options.activation_dropout == getattr(options, "drop_path_rate", 0.0) == 0.0
    experts = (options.moe_freq, options.moe_expert_count, options.moe_top_k, options.mhmoe_heads_number)
    heads = 4 if family == "mhmoe" else 1
    assert experts == ((0, None, None, None) if family == "dense" else (2, 8, 2, heads))
    assert options.mhmoe_budget == ("params" if family == "mhmoe" else None)


@pytest.mark.parametrize("size", SIZES)
def test_families_differ_in_the_moe_layers_only(size):
    options = [vars(architecture_options(f"{family}_lm_{size}")) for family in FAMILIES]
    for name in options[0]:
        if not name.startswith(("moe_", "mhmoe_")):
            assert len({str(values[name]) for values in options}) == 1, name


@pytest.mark.parametrize("arch", [f"{family}_{kind}_tiny" for family in FAMILIES for kind in KINDS])
def test_filling_twice_changes_nothing(arch):
    args = argparse.Namespace(moe_top1_expert=True) if not arch.startswith("dense") else argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    once = dict(vars(args))
    ARCH_CONFIG_REGISTRY[arch](args)
    assert vars(args) == once


def test_what_is_given_wins():
    options = architecture_options("mhmoe_lm_base", decoder_layers=4, moe_freq=4, mhmoe_heads_number=2, dropout=0.0)
    assert (options.decoder_layers, options.moe_freq, options.dropout, options.decoder_embed_dim) == (4, 4, 0.0, 768)
    assert moe_config(options).num_heads == 2


def test_unknown_names():
    with pytest.raises(ValueError, match=r"--arch \(mhmoe_lm_huge\) must be one of deepseekmoe_beit3_base, deep"):
        architecture_options("mhmoe_lm_huge")
    with pytest.raises(ValueError, match="--decoder-leyers is not an option of mhmoe_lm_tiny"):
        architecture_options("mhmoe_lm_tiny", decoder_leyers=3)

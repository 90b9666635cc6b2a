"""The list of flags is public: it changes on purpose or not at all."""

import argparse
import dataclasses
import inspect

import pytest

from mhmoe_fairseq.models import bases, flags, precision
from mhmoe_fairseq.models.beit3 import MHMoEBEiT3
from mhmoe_fairseq.models.language_model import MHMoELanguageModel
from mhmoe_fairseq.models.options import BEiT3Options, LanguageModelOptions

SHARED = """
--activation-dropout --activation-fn --attention-dropout --checkpoint-activations --deepnorm --dropout
--layernorm-embedding --mhmoe-balance-assignment --mhmoe-balance-scope --mhmoe-balancing
--mhmoe-balancing-rate --mhmoe-budget --mhmoe-capacity-factor
--mhmoe-expert-banks --mhmoe-expert-parallel-size --mhmoe-gate-scale --mhmoe-gate-score --mhmoe-granularity
--mhmoe-head-projection --mhmoe-heads-number --mhmoe-latent-dim --mhmoe-merge-norm
--mhmoe-merge-projection --mhmoe-no-split
--mhmoe-expert-groups --mhmoe-group-score --mhmoe-kept-groups
--mhmoe-normalize-gates --mhmoe-parallel --mhmoe-precision --mhmoe-projection-bias --mhmoe-projection-gain
--mhmoe-projection-layers --mhmoe-quantize --mhmoe-router --mhmoe-router-dim --mhmoe-router-input
--mhmoe-router-normalize --mhmoe-router-preset
--mhmoe-router-temperature --mhmoe-routing --mhmoe-shared-expert-dim --mhmoe-shared-experts
--mhmoe-subtoken-residual
--moe-eval-capacity-token-fraction --moe-expert-count --moe-ffn-dim --moe-freq --moe-gating-use-fp32
--moe-normalize-gate-prob-before-dropping --moe-second-expert-policy --moe-top-k --moe-top1-expert --no-bias
--no-subln --rms-norm --subln --use-xmoe
"""
OWN = {
    MHMoELanguageModel: """
--decoder-attention-heads --decoder-embed-dim --decoder-ffn-embed-dim --decoder-layers --decoder-learned-pos
--mhmoe-segment-length --no-scale-embedding --no-share-decoder-input-output-embed --no-token-positional-embeddings
--rotary-embed
--share-decoder-input-output-embed --xpos-rel-pos
""",
    MHMoEBEiT3: """
--drop-path-rate --encoder-attention-heads --encoder-embed-dim --encoder-ffn-embed-dim --encoder-layers
--mhmoe-modality-experts
""",
}
OPTIONS = {MHMoELanguageModel: LanguageModelOptions, MHMoEBEiT3: BEiT3Options}
both_models = pytest.mark.parametrize("model", OWN, ids=lambda model: model.__name__)


def parser(model):
    result = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    model.add_args(result)
    return result


@both_models
def test_flags_are_frozen(model):
    found = {flag for action in parser(model)._actions for flag in action.option_strings}
    assert found == set((SHARED + OWN[model]).split())


@both_models
def test_every_flag_has_help(model):
    for action in parser(model)._actions:
        assert action.help and len(action.help) > 10, action.option_strings


@both_models
def test_nothing_is_set_unless_given(model):
    assert vars(parser(model).parse_args([])) == {}
    for field in dataclasses.fields(OPTIONS[model]):
        assert field.default is None or str(field.default).startswith("${"), field.name


@both_models
def test_every_flag_is_read(model):
    """No dead flags: each sets a field of a layer or a stack, or is read by its name."""
    source = "".join(inspect.getsource(module) for module in (flags, bases, precision, inspect.getmodule(model)))
    for field in dataclasses.fields(OPTIONS[model]):
        known = field.metadata.get("layer") or field.metadata.get("stack")
        assert known or f".{field.name}" in source or f'"{field.name}"' in source, field.name

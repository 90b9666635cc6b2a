"""The list of flags is public: it changes on purpose or not at all."""

import argparse
import dataclasses

from mhmoe_fairseq.models.language_model import MHMoELanguageModel
from mhmoe_fairseq.models.options import LanguageModelOptions

FLAGS = """
--activation-dropout --activation-fn --attention-dropout --checkpoint-activations --decoder-attention-heads
--decoder-embed-dim --decoder-ffn-embed-dim --decoder-layers --decoder-learned-pos --deepnorm --dropout
--layernorm-embedding --mhmoe-balance-assignment --mhmoe-balance-scope --mhmoe-budget --mhmoe-capacity-factor
--mhmoe-expert-parallel-size --mhmoe-head-projection --mhmoe-heads-number --mhmoe-merge-projection --mhmoe-no-split
--mhmoe-normalize-gates --mhmoe-precision
--mhmoe-projection-bias --mhmoe-projection-layers --mhmoe-router --mhmoe-router-dim --mhmoe-router-normalize
--mhmoe-router-preset --mhmoe-router-temperature --mhmoe-routing --mhmoe-shared-expert-dim --mhmoe-subtoken-residual
--moe-eval-capacity-token-fraction --moe-expert-count --moe-ffn-dim --moe-freq --moe-gating-use-fp32
--moe-normalize-gate-prob-before-dropping --moe-second-expert-policy --moe-top-k --moe-top1-expert --no-bias
--no-scale-embedding --no-share-decoder-input-output-embed --no-subln --no-token-positional-embeddings --rms-norm
--rotary-embed --share-decoder-input-output-embed --subln --use-xmoe --xpos-rel-pos
"""


def parser():
    result = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    MHMoELanguageModel.add_args(result)
    return result


def test_flags_are_frozen():
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert flags == set(FLAGS.split())


def test_every_flag_has_help():
    for action in parser()._actions:
        assert action.help and len(action.help) > 10, action.option_strings


def test_nothing_is_set_unless_given():
    assert vars(parser().parse_args([])) == {}
    for field in dataclasses.fields(LanguageModelOptions):
        assert field.default is None or str(field.default).startswith("${"), field.name


def test_every_flag_is_read():
    """No dead flags: args.py or the model reads each by its name."""
    import inspect

    from mhmoe_fairseq.models import architectures, language_model
    from mhmoe_fairseq.torchscale_ext import args

    source = "".join(inspect.getsource(module) for module in (args, language_model, architectures))
    for field in dataclasses.fields(LanguageModelOptions):
        assert f".{field.name}" in source or f'"{field.name}"' in source, field.name

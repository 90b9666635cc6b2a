"""The fairseq model: precision, dictionary, refusals."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import TruncatedDictionary
from fairseq.models import FairseqIncrementalDecoder
from language_models import FAMILIES, small_dictionary, small_model, token_rows

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.language_model import MHMoELanguageModel, find_checkpoint, find_data


def task(dictionary=None, target=None):
    dictionary = dictionary or small_dictionary()
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=target or dictionary)


# ---------------------------------------------------------------------- building


def test_build_model_from_options():
    model = MHMoELanguageModel.build_model(architecture_options("mhmoe_lm_tiny", tokens_per_sample=128), task())
    assert isinstance(model.decoder, FairseqIncrementalDecoder)
    assert model.max_positions() == model.max_decoder_positions() == 128
    assert model.supported_targets == {"future"}
    longer = architecture_options("mhmoe_lm_tiny", tokens_per_sample=128, max_target_positions=512)
    assert MHMoELanguageModel.build_model(longer, task()).max_positions() == 512


def test_input_and_output_share_the_embedding_unless_told_otherwise():
    tied = small_model("dense_lm_tiny")
    assert tied.decoder.output_projection.weight is tied.decoder.embed_tokens.weight
    untied = small_model("dense_lm_tiny", no_share_decoder_input_output_embed=True)
    assert untied.decoder.output_projection.weight is not untied.decoder.embed_tokens.weight


def test_tpu_means_bf16_was_given():
    with pytest.raises(ValueError, match="--mhmoe-precision bf16"):
        MHMoELanguageModel.build_model(architecture_options("mhmoe_lm_tiny", tpu=True), task())


def test_an_architecture_is_needed():
    options = architecture_options("mhmoe_lm_tiny")
    options.decoder_layers = None
    with pytest.raises(ValueError, match="needs an architecture, such as mhmoe_lm_tiny"):
        MHMoELanguageModel.build_model(options, task())


def test_a_smaller_output_dictionary_is_refused():
    dictionary = small_dictionary()
    with pytest.raises(ValueError, match="--output-dictionary-size"):
        MHMoELanguageModel.build_model(
            architecture_options("mhmoe_lm_tiny"), task(dictionary, TruncatedDictionary(dictionary, 20))
        )


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_evaluation(family, precision, dtype):
    tokens = token_rows([6, 4])
    exact = small_model(f"{family}_lm_tiny").eval()(tokens)[0]
    model = small_model(f"{family}_lm_tiny", mhmoe_precision=precision).eval()
    logits, _ = model(tokens)
    assert logits.dtype == dtype and all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_normalized_probs((logits, None), log_probs=True).dtype == torch.float32
    # A rounded logit may route a sub-token elsewhere: compare the bulk, not the worst.
    assert (logits.float() - exact).abs().median() < 0.05 * exact.abs().median()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_trains_on_a_cpu(family):
    model = small_model(f"{family}_lm_tiny", mhmoe_precision="bf16", dropout=0.1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = token_rows([9, 9, 9])
    losses = []
    for _ in range(15):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_fp16_training_needs_loss_scaling():
    tokens = token_rows([4])
    with pytest.raises(
        ValueError, match="--mhmoe-precision fp16: training in fp16 needs loss scaling: add --amp or --fp16"
    ):
        small_model(mhmoe_precision="fp16").train()(tokens)
    for flag in ("amp", "fp16"):
        assert small_model(mhmoe_precision="fp16", **{flag: True}).train()(tokens)[0].dtype == torch.float16


# ---------------------------------------------------------------------- dictionary


def test_a_checkpoint_of_another_dictionary_is_refused():
    state = small_model().state_dict()
    with pytest.raises(ValueError, match=r"dictionary \(44 words\) is not this data's dict.txt \(54 words\)"):
        small_model(dictionary=small_dictionary(50)).load_state_dict(state)
    same_size = small_dictionary(39)
    same_size.add_symbol("another")
    with pytest.raises(ValueError, match="dictionary"):
        small_model(dictionary=same_size).load_state_dict(state)
    small_model(seed=1).load_state_dict(state)


def test_a_checkpoint_without_fingerprint_loads():
    state = small_model().state_dict()
    del state["decoder.vocabulary_fingerprint"]
    other = small_model(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.decoder.vocabulary_fingerprint, small_model().decoder.vocabulary_fingerprint)


# ---------------------------------------------------------------------- finding files


def test_find_checkpoint_prefers_the_best(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model.pt or checkpoint_best.pt or checkpoint_last.pt in"):
        find_checkpoint(tmp_path, None)
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path, None).name == name
    assert find_checkpoint(tmp_path / "checkpoint_last.pt", None).name == "checkpoint_last.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint7.pt in"):
        find_checkpoint(tmp_path, "checkpoint7.pt")


def test_find_data(tmp_path):
    checkpoint, data = tmp_path / "model" / "model.pt", tmp_path / "data"
    checkpoint.parent.mkdir()
    data.mkdir()
    torch.save({"cfg": {"task": {"data": f"{data}:elsewhere"}}}, checkpoint)
    with pytest.raises(FileNotFoundError, match="no dict.txt in .*: give data_name_or_path"):
        find_data(checkpoint, None)
    (data / "dict.txt").touch()
    assert find_data(checkpoint, None) == data
    (checkpoint.parent / "dict.txt").touch()
    assert find_data(checkpoint, None) == checkpoint.parent
    assert find_data(checkpoint, str(data)) == data

"""The loss of classification by hand, accuracy, and the gate loss as in language modelling."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from language_models import small_dictionary, small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.criterions.finetuning import SentenceClassificationConfig, SentenceClassificationCriterion
from mhmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyConfig, MoECrossEntropyCriterion

TASK = SimpleNamespace(target_dictionary=small_dictionary())


def criterion(gate=0.01, combine="average", z=0.0):
    config = SentenceClassificationConfig(
        moe_gate_loss_wt=gate, moe_gate_loss_combine_method=combine, mhmoe_z_loss_wt=z, classification_head_name="head"
    )
    return SentenceClassificationCriterion(TASK, config)


def classifier(arch="mhmoe_lm_tiny", **flags):
    model = small_model(arch, **flags)
    model.register_classification_head("head", num_classes=3)
    torch.nn.init.normal_(model.classification_heads["head"].weight)
    return model.eval()


def sample(lengths, targets, seed=0):
    rows = token_rows(lengths, seed)
    return {"net_input": {"src_tokens": rows}, "target": torch.tensor(targets), "ntokens": sum(lengths)}


def outputs(model, batch):
    return model(**batch["net_input"], classification_head_name="head")


def logged(*batches_of_logs):
    with metrics.aggregate(new_root=True) as aggregator:
        for logs in batches_of_logs:
            SentenceClassificationCriterion.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_loss_by_hand(combine):
    model, batch = classifier(decoder_layers=4), sample([9, 5, 2], [0, 2, 1])
    logits, extra = outputs(model, batch)
    losses = losses_of(extra)
    assert len(losses) == 2
    balance, z = losses.sum(0) / (1 if combine == "sum" else 2)
    loss, sample_size, _ = criterion(0.3, combine, 0.07)(model, batch)
    assert sample_size == 3
    expected = F.cross_entropy(logits, batch["target"], reduction="sum") + 3 * (0.3 * balance + 0.07 * z)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_the_gate_loss_is_that_of_language_modelling(combine):
    """What both criterions add to their own loss, per example and per token, is one number."""
    model, batch = classifier(decoder_layers=4), sample([9, 5, 2], [0, 2, 1])
    lm_batch = {**batch, "target": batch["net_input"]["src_tokens"]}
    flags = {"moe_gate_loss_combine_method": combine, "sentence_avg": False}
    lm, bare = (
        MoECrossEntropyCriterion(TASK, MoECrossEntropyConfig(moe_gate_loss_wt=gate, mhmoe_z_loss_wt=z, **flags))
        for gate, z in ((0.3, 0.07), (0, 0))
    )
    added = (lm(model, lm_batch)[0] - bare(model, lm_batch)[0]) / batch["ntokens"]
    ours = (criterion(0.3, combine, 0.07)(model, batch)[0] - criterion(0.0, combine)(model, batch)[0]) / 3
    torch.testing.assert_close(ours, added, atol=1e-5, rtol=1e-4)


def test_figures_are_exact_over_a_set_whatever_the_batches():
    model = classifier()
    batches = [sample([9, 5, 2], [0, 2, 1], 1), sample([4], [1], 2), sample([3, 8], [2, 2], 3)]
    logits = torch.cat([outputs(model, batch)[0] for batch in batches])
    targets = torch.cat([batch["target"] for batch in batches])
    logs = [criterion(5.0)(model, batch)[2] for batch in batches]
    right = (logits.argmax(1) == targets).float().mean().item()
    bits = F.cross_entropy(logits, targets).item() / math.log(2)
    summed = {key: sum(log[key] for log in logs) for key in logs[0]}
    assert SentenceClassificationCriterion.logging_outputs_can_be_summed()
    for values in (logged(*([log] for log in logs)), logged([summed])):
        assert values["accuracy"] == pytest.approx(100 * right, abs=0.01)
        assert values["loss"] == pytest.approx(bits, abs=1e-3)
        assert {"gate_loss", "z_loss", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy"} <= set(values)


def test_a_dense_model_has_plain_cross_entropy_and_no_moe_logs():
    model, batch = classifier("dense_lm_tiny"), sample([9, 5], [0, 2])
    loss, _, log = criterion(0.3, z=1.0)(model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(outputs(model, batch)[0], batch["target"], reduction="sum"))
    assert set(logged([log])) == {"loss", "accuracy"}

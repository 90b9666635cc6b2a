"""The loss by hand, and logs that are exact over a whole set."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from language_models import FAMILIES, small_dictionary, small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyConfig, MoECrossEntropyCriterion
from mhmoe_fairseq.moe.stats import active_share, load_max_over_mean


def criterion(gate=0.01, combine="average", z=0.0, sentence_avg=False):
    task = SimpleNamespace(target_dictionary=small_dictionary())
    config = MoECrossEntropyConfig(
        moe_gate_loss_wt=gate, moe_gate_loss_combine_method=combine, mhmoe_z_loss_wt=z, sentence_avg=sentence_avg
    )
    return MoECrossEntropyCriterion(task, config)


def sample(lengths, seed=0):
    rows = token_rows(lengths, seed)
    source, target = rows[:, :-1], rows[:, 1:]
    return {"net_input": {"src_tokens": source}, "target": target, "ntokens": int(target.ne(1).sum())}


def cross_entropy(model, batch, reduction="sum"):
    logits = model(**batch["net_input"])[0].float()
    return F.cross_entropy(logits.transpose(1, 2), batch["target"], ignore_index=1, reduction=reduction)


@pytest.mark.parametrize("combine", ["sum", "average"])
def test_loss_by_hand(combine):
    model, batch = small_model(decoder_layers=4).eval(), sample([9, 5])
    losses = losses_of(model(**batch["net_input"])[1])
    assert len(losses) == 2
    balance, z = losses.sum(0) / (1 if combine == "sum" else 2)
    loss, sample_size, _ = criterion(0.3, combine, 0.07)(model, batch)
    assert sample_size == batch["ntokens"] == 8 + 4
    expected = cross_entropy(model, batch) + sample_size * (0.3 * balance + 0.07 * z)
    torch.testing.assert_close(loss, expected)


def test_sentence_average_scales_the_auxiliary_losses():
    model, batch = small_model().eval(), sample([9, 5])
    loss, sample_size, log = criterion(0.3, sentence_avg=True)(model, batch)
    assert sample_size == 2
    balance = model(**batch["net_input"])[1]["moe"][1].balance_loss
    torch.testing.assert_close(loss, cross_entropy(model, batch) + 2 * 0.3 * balance)


def test_gradients_reach_the_router_through_the_weighted_losses():
    batch = sample([9, 5])
    gradients = []
    for weight in (0.0, 1.0):
        model = small_model().train()
        criterion(weight)(model, batch)[0].backward()
        gradients.append(model.decoder.layers[1].moe_layer.router.reduction.weight.grad)
    assert not torch.allclose(*gradients)


def test_a_dense_model_has_plain_cross_entropy_and_no_moe_logs():
    model, batch = small_model("dense_lm_tiny").eval(), sample([9, 5])
    loss, _, log = criterion(0.3, z=1.0)(model, batch)
    torch.testing.assert_close(loss, cross_entropy(model, batch))
    assert set(log) == {"loss", "ntokens", "nsentences", "sample_size"}
    assert set(logged([log])) == {"loss", "ppl"}


@pytest.mark.parametrize("takes_targets", [True, False], ids=["ours", "of fairseq"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unreduced_is_cross_entropy_per_target(takes_targets, precision):
    model, batch = small_model(mhmoe_precision=precision).eval(), sample([9, 5])
    model.takes_targets = takes_targets
    losses, _, _ = criterion()(model, batch, reduce=False)
    torch.testing.assert_close(losses, cross_entropy(model, batch, reduction="none").flatten())


@pytest.mark.parametrize("flag, values", [("--moe-gate-loss-wt", (-1, 0)), ("--mhmoe-z-loss-wt", (0, -1))])
def test_negative_weights_are_refused(flag, values):
    with pytest.raises(ValueError, match=flag):
        criterion(gate=values[0], z=values[1])


# ---------------------------------------------------------------------- logs


def logged(*batches_of_logs):
    """What fairseq shows after reducing each of these lists of logs in turn, as in a validation."""
    with metrics.aggregate(new_root=True) as aggregator:
        for logs in batches_of_logs:
            MoECrossEntropyCriterion.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def log_of(model, batch, **kwargs):
    return criterion(**kwargs)(model, batch)[2]


def test_logged_loss_is_cross_entropy_in_bits():
    model, batch = small_model().eval(), sample([9, 5])
    bits = cross_entropy(model, batch).item() / 12 / math.log(2)
    values = logged([log_of(model, batch, gate=5.0, z=5.0)])
    assert values["loss"] == pytest.approx(bits, abs=1e-3)
    assert values["ppl"] == pytest.approx(2**bits, rel=1e-2)
    assert "nll_loss" not in values
    by_sentence = logged([log_of(model, batch, sentence_avg=True)])
    assert by_sentence["loss"] == pytest.approx(6 * bits, abs=1e-2)
    assert by_sentence["nll_loss"] == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_validation_figures_are_exact_whatever_the_batches(family):
    model = small_model(f"{family}_lm_tiny", decoder_layers=4).eval()
    batches = [sample([9, 5], 1), sample([3], 2), sample([7, 7, 2], 3)]
    values = logged(*([log_of(model, batch)] for batch in batches))

    # By hand, from all tokens at once.
    layers = [[model(**batch["net_input"])[1]["moe"][i].stats for batch in batches] for i in (1, 3)]
    load = torch.stack([sum(stats.expert_load for stats in layer) for layer in layers])
    entropy = [sum(s.entropy for s in layer) / sum(s.num_subtokens for s in layer) for layer in layers]
    assert values["moe_active"] == pytest.approx(active_share(load).mean().item(), abs=1e-4)
    assert values["moe_load_max"] == pytest.approx(load_max_over_mean(load).mean().item(), abs=1e-4)
    assert values["moe_entropy"] == pytest.approx((sum(entropy) / 2).item(), abs=1e-4)
    assert values["moe_overflow"] == 0 and values["moe_choices"] == 2
    # The mean over batches would be something else.
    means = [load_max_over_mean(log_of(model, batch)["moe_load"]).mean() for batch in batches]
    assert abs(sum(means) / 3 - values["moe_load_max"]) > 1e-3


def test_choices_are_those_that_were_made() -> None:
    model, batch = small_model("remoe_lm_tiny", decoder_layers=4).eval(), sample([9, 5])
    layers = [model(**batch["net_input"])[1]["moe"][i].stats for i in (1, 3)]
    by_hand = sum(float(stats.expert_load.sum() / stats.num_subtokens) for stats in layers) / 2
    assert logged([log_of(model, batch)])["moe_choices"] == pytest.approx(by_hand, abs=1e-4)
    assert by_hand == pytest.approx(4, abs=1.5) and by_hand != 2  # before any training about half of 8, whatever K


def test_summed_logs_are_the_same():
    model = small_model().eval()
    logs = [log_of(model, sample([9, 5], 1)), log_of(model, sample([3], 2))]
    summed = {key: logs[0][key] + logs[1][key] for key in logs[0]}
    assert MoECrossEntropyCriterion.logging_outputs_can_be_summed()
    assert logged([summed]) == pytest.approx(logged(logs))
    assert logged([summed]) == pytest.approx(logged(logs[:1], logs[1:]), abs=2e-3)


def test_gate_and_z_loss_are_means_per_target():
    model = small_model().eval()
    batches = [sample([9, 5], 1), sample([3], 2)]
    losses = [losses_of(model(**batch["net_input"])[1])[0] for batch in batches]
    values = logged(*([log_of(model, batch)] for batch in batches))
    expected = (12 * losses[0] + 2 * losses[1]) / 14
    assert values["gate_loss"] == pytest.approx(expected[0].item(), abs=1e-3)
    assert values["z_loss"] == pytest.approx(expected[1].item(), abs=1e-3)


def test_overflow_under_capacity_routing():
    model = small_model(mhmoe_routing="capacity", moe_eval_capacity_token_fraction=0.05).eval()
    log = log_of(model, sample([30]))
    assert logged([log])["moe_overflow"] == pytest.approx(
        (log["moe_dropped"] / log["moe_load"].sum(1)).item(), abs=1e-4
    )
    assert logged([log])["moe_overflow"] > 0.2

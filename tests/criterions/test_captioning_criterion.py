"""The captioning criterion against a slow reference: masked tokens alone, smoothing, the worst tokens, metrics."""

import math

import pytest
import torch
from beit3_models import beit3_batch, small_beit3
from fairseq.logging import metrics
from moe_oracle import losses_of

from mhmoe_fairseq.criterions.captioning import CaptioningConfig, CaptioningCriterion, smoothed_divergence


class Task:
    """What fairseq's base class reads."""

    num_updates = 0

    def __init__(self, dictionary):
        self.target_dictionary = dictionary


@pytest.fixture(scope="module")
def model():
    return small_beit3(num_visual_tokens=0)


def criterion(model, **changes):
    settings = {"moe_gate_loss_wt": 0.0, "drop_worst_ratio": 0.0, "drop_worst_after": 0, **changes}
    return CaptioningCriterion(Task(model.dictionary), CaptioningConfig(**settings))


def batch_of(model, lengths=(7, 4, 9), seed=0):
    """Captions of which every third token is predicted, the first one never."""
    inputs = {key: value.float() if key == "images" else value for key, value in
              beit3_batch("pair", list(lengths), seed=seed).items()}  # fmt: skip
    tokens, pad = inputs["text_tokens"].clone(), model.dictionary.pad()
    targets = torch.full_like(tokens, pad)
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[:, 1::3] = True
    chosen &= tokens.ne(pad)
    targets[chosen] = tokens[chosen]
    inputs["text_tokens"][chosen] = model.dictionary.index("<mask>")
    return {"net_input": inputs, "text_targets": targets, "nsentences": len(lengths), "ntokens": int(chosen.sum())}


def reference(model, sample, smoothing):
    """The divergence of every masked token, symbol by symbol, and its cross entropy."""
    features, extra = model(**sample["net_input"], attention="caption")
    found = []
    for row, targets in enumerate(sample["text_targets"]):
        for place, target in enumerate(targets.tolist()):
            if target == model.dictionary.pad():
                continue
            scores = model.text_logits(features[row, extra["image_positions"] + place]).tolist()
            total = math.log(sum(math.exp(score) for score in scores))
            divergence = 0.0
            for symbol, score in enumerate(scores):
                wanted = 1 - smoothing if symbol == target else smoothing / (len(scores) - 1)
                divergence += wanted * (math.log(wanted) - (score - total)) if wanted else 0.0
            found.append((divergence, total - scores[target], scores.index(max(scores)) == target))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@torch.no_grad()
def test_sum_over_masked_tokens(model, smoothing):
    sample = batch_of(model.eval())
    expected = reference(model, sample, smoothing)
    loss, sample_size, log = criterion(model, label_smoothing=smoothing)(model, sample)
    assert sample_size == log["ntokens"] == len(expected) == 6
    assert float(loss) == pytest.approx(sum(row[0] for row in expected), rel=1e-4)
    assert float(log["nll_loss"]) == pytest.approx(sum(row[1] for row in expected), rel=1e-4)
    assert int(log["ncorrect"]) == sum(row[2] for row in expected)


def test_divergence_is_zero_where_the_model_gives_the_smoothed_target():
    wanted = torch.full((1, 5), 0.1 / 4)
    wanted[0, 2] = 0.9
    assert float(smoothed_divergence(wanted.log(), torch.tensor([2]), 0.1)) == pytest.approx(0, abs=1e-6)
    assert float(smoothed_divergence(wanted.log(), torch.tensor([1]), 0.1)) > 1


@torch.no_grad()
def test_the_worst_tokens_do_not_count_in_training_after_some_updates(model):
    sample = batch_of(model.eval())
    expected = sorted(row[0] for row in reference(model, sample, 0.1))
    dropping = criterion(model, drop_worst_ratio=0.3, drop_worst_after=10)
    counted = []
    for updates, is_training in ((9, True), (10, True), (10, False)):
        dropping.task.num_updates = updates
        model.train(is_training)  # without dropout
        loss, sample_size, log = dropping(model, sample)
        counted.append(sample_size)
        assert float(loss) == pytest.approx(sum(expected[:sample_size]), rel=1e-4)
        assert log["ntokens"] == 6
    assert counted == [6, 4, 6]  # int(6 * 0.7) of them
    model.eval()


@torch.no_grad()
def test_balance_loss_for_every_token_that_counts(model):
    sample = batch_of(model.eval())
    balance, z = losses_of(model(**sample["net_input"], attention="caption")[1]).mean(0).tolist()
    plain, _, _ = criterion(model)(model, sample)
    whole, _, log = criterion(model, moe_gate_loss_wt=0.5, mhmoe_z_loss_wt=0.25)(model, sample)
    assert float(whole - plain) == pytest.approx(6 * (0.5 * balance + 0.25 * z), rel=1e-4)
    assert float(log["loss"]) == pytest.approx(float(plain), rel=1e-6)


@torch.no_grad()
def test_padding_changes_nothing(model):
    sample = batch_of(model.eval())
    padded = {**sample, "net_input": dict(sample["net_input"])}
    pad = model.dictionary.pad()
    for place, key in ((padded["net_input"], "text_tokens"), (padded, "text_targets")):
        place[key] = torch.nn.functional.pad(place[key], (0, 2), value=pad)
    one, other = (criterion(model)(model, given)[0] for given in (sample, padded))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_metrics_come_from_sums_over_batches(model):
    checker = criterion(model.eval())
    logs = [checker(model, batch_of(model, lengths, seed=seed))[2] for seed, lengths in enumerate([(7, 9), (4, 5, 6)])]
    logs[0].update(cider_sum=3.0, captions=2)
    logs[1].update(cider_sum=1.0, captions=3)
    with metrics.aggregate(new_root=True) as found:
        checker.reduce_metrics(logs)
    tokens = sum(log["ntokens"] for log in logs)
    bits = sum(float(log["nll_loss"]) for log in logs) / tokens / math.log(2)
    values = found.get_smoothed_values()
    assert values["nll_loss"] == pytest.approx(bits, abs=1e-3)
    assert values["ppl"] == pytest.approx(2**bits, rel=1e-2)
    assert values["accuracy"] == pytest.approx(100 * sum(int(log["ncorrect"]) for log in logs) / tokens, abs=0.01)
    assert values["loss"] == pytest.approx(sum(float(log["loss"]) for log in logs) / tokens / math.log(2), abs=1e-3)
    assert values["cider"] == pytest.approx(100 * 4.0 / 5)


@torch.no_grad()
def test_the_logged_loss_is_of_tokens_that_count_and_the_others_of_all_masked_ones(model):
    checker = criterion(model.train(), drop_worst_ratio=0.5)  # without dropout
    log = checker(model, batch_of(model))[2]
    model.eval()
    with metrics.aggregate(new_root=True) as found:
        checker.reduce_metrics([log])
    values = found.get_smoothed_values()
    assert (log["sample_size"], log["ntokens"]) == (3, 6)
    assert values["loss"] == pytest.approx(float(log["loss"]) / 3 / math.log(2), abs=1e-3)
    assert values["nll_loss"] == pytest.approx(float(log["nll_loss"]) / 6 / math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label_smoothing": 1.0}, r"--label-smoothing \(1.0\) must be in \[0, 1\)"),
        ({"drop_worst_ratio": -0.1}, r"--drop-worst-ratio \(-0.1\)"),
        ({"drop_worst_after": -1}, r"--drop-worst-after \(-1\) must be at least 0"),
        ({"moe_gate_loss_wt": -1.0}, "--moe-gate-loss-wt"),
        ({"mhmoe_z_loss_wt": -1.0}, "--mhmoe-z-loss-wt"),
    ],
)
def test_bad_flags(model, changes, message):
    with pytest.raises(ValueError, match=message):
        criterion(model, **changes)

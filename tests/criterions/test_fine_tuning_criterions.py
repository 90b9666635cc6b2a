"""Losses and figures of fine-tuning on images against loops over rows, and the gate loss on top."""

import math
from types import SimpleNamespace

import pytest
import torch
from beit3_models import beit3_batch, beit3_dictionary, small_beit3
from fairseq.logging import metrics
from moe_oracle import losses_of

from mhmoe_fairseq.criterions import finetuning
from mhmoe_fairseq.criterions.base import GateLossConfig
from mhmoe_fairseq.models.heads import ImageClassificationHead, NLVR2Head, RetrievalHead, VQAHead

WIDTH, ANSWERS, CLASSES = 32, 7, 8
HEADS = {
    "vqa": lambda: VQAHead(WIDTH, ANSWERS),
    "nlvr2": lambda: NLVR2Head(WIDTH),
    "image_classification": lambda: ImageClassificationHead(WIDTH, CLASSES),
    "retrieval": lambda: RetrievalHead(WIDTH),
}
CRITERIONS = {
    "vqa": finetuning.VQACriterion,
    "nlvr2": finetuning.NLVR2Criterion,
    "image_classification": finetuning.ImageClassificationCriterion,
    "retrieval": finetuning.RetrievalCriterion,
}
CONFIGS = {"image_classification": finetuning.ImageClassificationConfig}  # 0.1 of label smoothing


def model_of(name, arch="mhmoe_beit3_tiny", **flags):
    model = small_beit3(arch, num_visual_tokens=0, **flags)
    torch.manual_seed(1)
    model.register_head(name, HEADS[name]())
    for parameter in model.heads.parameters():  # heads that start at nothing would hide faults
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.double().eval()


def criterion_of(name, gate=0.0, z=0.0, **flags):
    task = SimpleNamespace(head_name=name, target_dictionary=beit3_dictionary())
    config = CONFIGS.get(name, GateLossConfig)
    return CRITERIONS[name](task, config(moe_gate_loss_wt=gate, mhmoe_z_loss_wt=z, **flags))


def batch_of(name, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    inputs = beit3_batch("image" if name == "image_classification" else "pair", lengths, seed)
    targets = torch.randint(2 if name == "nlvr2" else CLASSES, (rows,), generator=generator)
    if name == "vqa":
        targets = torch.rand(rows, ANSWERS, generator=generator).round(decimals=1)
    if name == "nlvr2":
        inputs["images"] = torch.cat([inputs["images"], inputs["images"].flip(0)])
        inputs["text_tokens"] = inputs["text_tokens"].repeat(2, 1)
    return {
        "id": torch.arange(rows) + 10 * seed,
        "image_ids": torch.arange(rows) + 10 * seed,
        "net_input": inputs,
        "targets": targets,
        "ntokens": sum(lengths),
        "nsentences": rows,
    }


def log_softmax(row):
    return row - math.log(sum(math.exp(value) for value in row.tolist()))


def vqa_by_hand(logits, scores):
    total = 0.0
    for row, own in zip(logits.tolist(), scores.tolist()):
        for logit, score in zip(row, own):
            probability = 1 / (1 + math.exp(-logit))
            total -= score * math.log(probability) + (1 - score) * math.log(1 - probability)
    return total


def classes_by_hand(logits, targets, smoothing=0.0):
    total = 0.0
    for row, target in zip(logits, targets.tolist()):
        log_probs = log_softmax(row)
        total -= (1 - smoothing) * float(log_probs[target]) + smoothing * float(log_probs.mean())
    return total


def contrast_by_hand(images, texts, scale):
    total = 0.0
    for row in range(len(images)):
        to_texts = torch.stack([scale * images[row] @ text for text in texts])
        to_images = torch.stack([scale * texts[row] @ image for image in images])
        total -= (float(log_softmax(to_texts)[row]) + float(log_softmax(to_images)[row])) / 2
    return total


def outputs(model, name, batch):
    """What the head gives, and the extras of the calls."""
    if name != "retrieval":
        logits, extra = model(**batch["net_input"], head=name)
        return logits.detach(), [extra]
    images, one = model(images=batch["net_input"]["images"], head=name)
    texts, two = model(text_tokens=batch["net_input"]["text_tokens"], head=name)
    return (images.detach(), texts.detach()), [one, two]


def by_hand(model, name, batch):
    found, extras = outputs(model, name, batch)
    if name == "vqa":
        return vqa_by_hand(found, batch["targets"]), extras
    if name == "retrieval":
        return contrast_by_hand(*found, float(model.heads[name].logit_scale.detach().exp())), extras
    return classes_by_hand(
        found, batch["targets"], 0.1 if name == "image_classification" and model.training else 0
    ), extras


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_loss_by_hand_with_the_gate_loss(name, training):
    model, batch = model_of(name).train(training), batch_of(name, [9, 5, 2])
    expected, extras = by_hand(model, name, batch)
    balance, z = torch.stack([losses_of(extra).mean(0) for extra in extras]).mean(0)
    loss, sample_size, _ = criterion_of(name, 0.3, 0.07)(model, batch)
    assert sample_size == 3
    assert loss.item() == pytest.approx(expected + 3 * (0.3 * balance + 0.07 * z).item(), rel=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_unreduced_is_one_loss_for_each_row(name):
    model, batch = model_of(name, "dense_beit3_tiny"), batch_of(name, [9, 5, 2])
    losses, _, log = criterion_of(name)(model, batch, reduce=False)
    assert losses.shape == (3,) and "gate_loss" not in log
    assert losses.sum().item() == pytest.approx(by_hand(model, name, batch)[0], rel=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_all_that_is_used(name):
    model, batch = model_of(name).train(), batch_of(name, [9, 5, 2])
    criterion_of(name, gate=1.0)(model, batch)[0].backward()
    beit3 = model.beit3
    used = [beit3.vision_embed.proj.weight, beit3.encoder.layers[1].moe_layer.router.reduction.weight]
    if name != "image_classification":
        used.append(beit3.text_embed.weight)
    for parameter in (*used, *model.heads.parameters()):
        assert parameter.grad.abs().sum() > 0


def logged(name, *batches_of_logs):
    with metrics.aggregate(new_root=True) as aggregator:
        for logs in batches_of_logs:
            CRITERIONS[name].reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def figures_by_hand(name, logits, targets):
    """Names and percentages."""
    if name == "vqa":
        return {
            "vqa_score": 100 * sum(row[best] for row, best in zip(targets.tolist(), logits.argmax(1))) / len(logits)
        }
    order = [sorted(range(row.numel()), key=lambda label, row=row: -float(row[label])) for row in logits]
    found = {"accuracy": sum(best[0] == target for best, target in zip(order, targets.tolist()))}
    if name == "image_classification":
        found["accuracy5"] = sum(target in best[:5] for best, target in zip(order, targets.tolist()))
    return {key: 100 * count / len(logits) for key, count in found.items()}


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "image_classification"])
def test_figures_are_exact_over_a_set_whatever_the_batches(name):
    model, criterion = model_of(name), criterion_of(name, 5.0)
    batches = [batch_of(name, lengths, seed) for seed, lengths in enumerate(([9, 5, 2], [4], [3, 8, 3, 7, 2]))]
    logits = torch.cat([outputs(model, name, batch)[0] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    bits = sum(by_hand(model, name, batch)[0] for batch in batches) / len(logits) / math.log(2)
    logs = [criterion(model, batch)[2] for batch in batches]
    summed = {key: sum(log[key] for log in logs) for key in logs[0]}
    assert CRITERIONS[name].logging_outputs_can_be_summed()
    for values in (logged(name, *([log] for log in logs)), logged(name, [summed])):
        assert values["loss"] == pytest.approx(bits, abs=1e-3)
        for key, expected in figures_by_hand(name, logits, targets).items():
            assert values[key] == pytest.approx(expected, abs=0.01), key
        assert {"gate_loss", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy"} <= set(values)


def test_samples_that_stand_for_bad_images_are_counted():
    model, criterion = model_of("vqa", "dense_beit3_tiny"), criterion_of("vqa")
    logs = [criterion(model, {**batch_of("vqa", [4, 3]), "num_replaced": number})[2] for number in (2, 0, 1)]
    assert logged("vqa", *([log] for log in logs))["replaced"] == 3
    assert "replaced" not in logged("vqa", [logs[1]])


def test_retrieval_logs_what_is_found_within_a_batch():
    model, batch = model_of("retrieval", "dense_beit3_tiny"), batch_of("retrieval", [9, 5, 2, 4, 7, 3], seed=3)
    (images, texts), _ = outputs(model, "retrieval", batch)
    values = logged("retrieval", [criterion_of("retrieval")(model, batch)[2]])
    for name, own, others in (("image", images, texts), ("text", texts, images)):
        found = [int(x @ others[row] == max(x @ other for other in others)) for row, x in enumerate(own)]
        assert values[f"{name}_accuracy"] == pytest.approx(100 * sum(found) / 6, abs=0.01)
    assert values["image_accuracy"] != values["text_accuracy"]
    assert set(values) == {"loss", "image_accuracy", "text_accuracy"}


def test_retrieval_gives_vectors_with_their_numbers():
    model, batch = model_of("retrieval", "dense_beit3_tiny"), batch_of("retrieval", [9, 5], seed=2)
    criterion = criterion_of("retrieval")
    ids, _, images, texts = criterion.vectors(criterion.embed(model, batch), batch)
    assert ids.tolist() == [20, 21] and images.shape == texts.shape == (2, WIDTH)
    assert not images.requires_grad


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_bad_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match="--label-smoothing"):
        criterion_of("image_classification", label_smoothing=smoothing)

"""The criterion of masked data modelling against loops over the masked positions."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from beit3_models import IMAGE_POSITIONS, beit3_batch, small_beit3
from fairseq.logging import metrics
from images_and_words import IMG_SIZE, PATCH_SIZE, write_images_and_words
from moe_oracle import losses_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhmoe_fairseq.criterions import masked_multimodal as masked
from mhmoe_fairseq.criterions.base import GateLossConfig, MoECriterion, log_layers
from mhmoe_fairseq.criterions.masked_multimodal import PARTS
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import MHMoEBEiT3, build_beit3
from mhmoe_fairseq.moe import MHMoEOutput, RoutingStats
from mhmoe_fairseq.moe.stats import active_share, load_max_over_mean
from mhmoe_fairseq.tasks.masked_multimodal import MaskedMultimodalTask, MaskedMultimodalTaskConfig

SHAPES = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
SMALL = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 32}
MOE = {"moe_freq": 1, "moe_expert_count": 4, "moe_ffn_dim": 16, "mhmoe_heads_number": 2, "moe_top_k": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


def build_task(data: Path, **flags: Any) -> MaskedMultimodalTask:
    config = MaskedMultimodalTaskConfig(data=str(data), tpu=False, seed=1)
    return MaskedMultimodalTask.setup_task(Namespace(**{**vars(config), **SHAPES, **flags}))


def build_model(task: MaskedMultimodalTask, arch: str = "mhmoe_beit3_tiny") -> MHMoEBEiT3:
    torch.manual_seed(1)
    moe = {} if arch.startswith("dense") else MOE
    options = architecture_options(arch, **SMALL, **moe, dropout=0.0, **SHAPES)
    return build_beit3(options, task.source_dictionary, task.num_visual_tokens)


def batch_of(task: MaskedMultimodalTask, size: int = 6, split: str = "train") -> dict[str, Any]:
    if split not in task.datasets:
        task.load_dataset(split)
    dataset = task.dataset(split)
    return dataset.collater([dataset[index] for index in dataset.ordered_indices()[:size]])


def criterion_of(
    task: Any, average: str = "part", weight: float = 0.1, z_weight: float = 0.01, combine: str = "average"
):
    gate = {"moe_gate_loss_wt": weight, "moe_gate_loss_combine_method": combine, "mhmoe_z_loss_wt": z_weight}
    config = masked.MaskedMultimodalConfig(masked_loss_average=average, **gate)
    return masked.MaskedMultimodalCriterion(task, config)


@torch.no_grad()
def slow_parts(task: MaskedMultimodalTask, model: MHMoEBEiT3, batch: dict[str, Any]) -> dict[str, tuple]:
    """Part -> sum of losses in nats, positions, right answers: position by position, all logits computed."""
    found: dict[str, list] = {part: [0.0, 0, 0] for part in PARTS}

    def count(part: str, logits: Tensor, target: int) -> None:
        found[part][0] += float(torch.logsumexp(logits.double(), 0) - logits[target])
        found[part][1] += 1
        found[part][2] += int(max(range(len(logits)), key=lambda place: float(logits[place])) == target)

    for modality in ("image", "text", "pair"):
        sub = batch[modality]
        features, extra = model(**sub["net_input"])
        prefix = "pair_" if modality == "pair" else ""
        rows = features.size(0)
        if modality != "text":
            codes = task.visual_tokenizer.encode(sub["tokenizer_images"] / 255)
            for row in range(rows):
                for patch in range(codes.size(1)):
                    if sub["net_input"]["masked_patches"][row, patch]:
                        count(f"{prefix}image", model.image_logits(features[row, 1 + patch]), int(codes[row, patch]))
        if modality != "image":
            start = 0 if modality == "text" else 1 + (IMG_SIZE // PATCH_SIZE) ** 2
            for row in range(rows):
                for place, target in enumerate(sub["text_targets"][row].tolist()):
                    if target != task.source_dictionary.pad():
                        count(f"{prefix}text", model.text_logits(features[row, start + place]), target)
    return {part: tuple(sums) for part, sums in found.items()}


def auxiliary(model: MHMoEBEiT3, batch: dict[str, Any], combine: str = "average") -> tuple[float, float]:
    """Balance and z-loss: combined over the layers, mean of the calls."""
    calls = []
    for modality in (name for name in ("image", "text", "pair") if name in batch):
        layers = losses_of(model(**batch[modality]["net_input"])[1])
        calls.append(layers.sum(0) if combine == "sum" else layers.mean(0))
    return tuple(torch.stack(calls).mean(0).tolist())


@pytest.mark.parametrize("combine", ["average", "sum"])
def test_the_loss_is_the_mean_of_the_four_parts_and_of_the_calls_auxiliary_losses(data: Path, combine: str) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    parts = slow_parts(task, model, batch)
    balance, z = auxiliary(model, batch, combine)
    loss, sample_size, log = criterion_of(task, combine=combine)(model, batch)
    expected = sum(nats / count for nats, count, _ in parts.values()) / 4 + 0.1 * balance + 0.01 * z
    assert sample_size == log["nsentences"] == 6
    assert loss.item() == pytest.approx(6 * expected, rel=1e-5)
    assert float(log["gate_loss"]) == pytest.approx(6 * balance, rel=1e-5)
    for part, (nats, count, correct) in parts.items():
        assert float(log[f"{part}_loss"]) == pytest.approx(nats, rel=1e-5)
        assert (int(log[f"{part}_targets"]), int(log[f"{part}_correct"])) == (count, correct)


def test_positions_are_those_that_the_model_worked_on(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    worked_on = 0
    for modality in ("image", "text", "pair"):
        features, extra = model(**batch[modality]["net_input"])
        padded = 0 if extra["padding_mask"] is None else int(extra["padding_mask"].sum())
        worked_on += features.shape[:2].numel() - padded
        assert modality != "text" or padded > 0
    assert criterion_of(task)(model, batch)[2]["ntokens"] == worked_on


def test_all_masked_positions_alike(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    parts = slow_parts(task, model, batch)
    balance, z = auxiliary(model, batch)
    loss, sample_size, _ = criterion_of(task, average="target")(model, batch)
    targets = sum(count for _, count, _ in parts.values())
    assert sample_size == targets == sum(batch[name]["ntokens"] for name in ("image", "text", "pair"))
    assert (loss / targets).item() == pytest.approx(
        sum(nats for nats, _, _ in parts.values()) / targets + 0.1 * balance + 0.01 * z, rel=1e-5
    )


def test_only_masked_positions_are_in_the_loss(data: Path) -> None:
    """Targets elsewhere may be anything."""
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    criterion = criterion_of(task)
    codes = task.image_targets(batch["image"])
    before = criterion(model, batch)[0]
    masked = batch["image"]["net_input"]["masked_patches"]
    task.image_targets = lambda sub: torch.where(sub["net_input"]["masked_patches"], task_codes(sub), 0)
    encode = task.visual_tokenizer.encode

    def task_codes(sub: dict[str, Any]) -> Tensor:
        return encode(sub["tokenizer_images"] / 255)

    assert torch.equal(criterion(model, batch)[0], before)
    assert not torch.equal(codes, torch.where(masked, codes, 0))
    task.image_targets = lambda sub: torch.where(sub["net_input"]["masked_patches"], 0, task_codes(sub))
    assert not torch.equal(criterion(model, batch)[0], before)


class Replay(nn.Module):
    """A model that has been called: gives its features once more, and predicts."""

    def __init__(self, model: MHMoEBEiT3, batch: dict[str, Any]) -> None:
        super().__init__()
        self.outputs = [model(**batch[modality]["net_input"]) for modality in ("image", "text", "pair")]
        self.predict_patches, self.predict_words = model.predict_patches, model.predict_words

    def forward(self, **net_input: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.outputs.pop(0)


class Operators(TorchDispatchMode):
    """Names of the operators that were called, those with a mask as index apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves(args[1:]) if torch.is_tensor(value)]
        has_mask = "index" in str(function) and any(value.dtype == torch.bool for value in tensors)
        self.names.add(f"{function} by a mask" if has_mask else str(function))
        return function(*args, **(kwargs or {}))


def test_the_criterion_waits_for_no_result(data: Path) -> None:
    """On a GPU these keep the host from queueing work: sizes or values that are read, and copies from the host."""
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    replay, criterion = Replay(model, batch), criterion_of(task)
    codes = [task.image_targets(batch[modality]) for modality in ("image", "pair")]
    task.image_targets = lambda sub: codes.pop(0)
    with Operators() as called:
        criterion(replay, batch)[0].backward()
    assert "aten.index_select.default" in called.names  # the operators were seen
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "by a mask", "lift_fresh", "is_nonzero")
    assert not [name for name in called.names if any(word in name for word in waiting)]


def test_every_parameter_learns_from_a_batch(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    criterion_of(task)(model, batch)[0].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in (model.image_head.weight, model.text_head.weight))


def test_the_log_adds_up_over_batches(data: Path) -> None:
    task = build_task(data)
    model = build_model(task).eval()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    criterion = criterion_of(task)

    def logged(batch_size: int) -> tuple[dict[str, float], int]:
        uncounted, tokens = 0, 0
        with metrics.aggregate(new_root=True) as found, torch.no_grad():
            for indices in dataset.batch_by_size(dataset.ordered_indices(), max_sentences=batch_size):
                batch = dataset.collater([dataset[index] for index in indices])
                uncounted += sum(not batch[name]["counted"] for name in ("image", "text", "pair"))
                log = criterion(model, batch)[2]
                tokens += log["ntokens"]
                criterion.reduce_metrics([log])  # once for each batch, as a validation does
            return {**{key: float(value) for key, value in found.get_smoothed_values().items()}, "n": tokens}, uncounted

    (whole, none), (by_batches, some) = logged(12), logged(1)
    assert none == 0 and some == (12 - 5) + (12 - 9)  # images and pairs, of which there are fewer than texts
    for key in (*(f"{part}_{figure}" for part in PARTS for figure in ("loss", "ppl", "accuracy")), "loss", "ppl"):
        assert by_batches[key] == pytest.approx(whole[key], abs=2e-3), key
    for key in ("moe_active", "moe_load_max", "moe_overflow", "moe_entropy"):
        assert by_batches[key] == pytest.approx(whole[key], abs=2e-4), key
    assert by_batches["n"] == whole["n"]
    assert by_batches["loss"] == pytest.approx(sum(whole[f"{part}_loss"] for part in PARTS) / 4, abs=2e-3)
    assert whole["image_ppl"] == pytest.approx(2 ** whole["image_loss"], rel=2e-3)
    assert whole["ppl"] == pytest.approx(2 ** whole["nll_loss"], rel=2e-3)
    assert 0 < whole["moe_active"] <= 1


def test_an_interval_without_targets_of_a_part(data: Path) -> None:
    """fairseq resets the meters after a log interval and keeps them: one that got nothing has no mean."""
    task = build_task(data)
    model, batch = build_model(task, "dense_beit3_tiny"), batch_of(task)
    criterion = criterion_of(task)
    with_words = criterion(model, batch)[2]
    no_words = batch["pair"]["masked_token_indices"][:0]
    without = criterion(model, {**batch, "pair": {**batch["pair"], "masked_token_indices": no_words}})[2]
    assert int(with_words["pair_text_targets"]) > 0 == int(without["pair_text_targets"])
    with metrics.aggregate(new_root=True) as found:
        criterion.reduce_metrics([with_words])
        found.reset()
        assert found.get_smoothed_values()["loss"] == 0
        criterion.reduce_metrics([without])
        values = found.get_smoothed_values()
    others = [values[f"{part}_loss"] for part in PARTS if part != "pair_text"]
    assert values["loss"] == pytest.approx(sum(others) / 3, abs=2e-3)


def test_the_figure_of_all_positions_weighs_parts_by_their_positions(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    parts = slow_parts(task, model, batch)
    with metrics.aggregate(new_root=True) as found:
        criterion_of(task, average="target").reduce_metrics([criterion_of(task, average="target")(model, batch)[2]])
        values = found.get_smoothed_values()
    bits = sum(nats for nats, _, _ in parts.values()) / sum(count for _, count, _ in parts.values()) / math.log(2)
    assert values["nll_loss"] == pytest.approx(bits, abs=1e-3)
    assert values["loss"] == values["nll_loss"]
    for part, (_, count, correct) in parts.items():
        assert values[f"{part}_accuracy"] == pytest.approx(100 * correct / count, abs=0.01)
    assert sum(correct for _, _, correct in parts.values()) > 0


def test_what_is_not_counted_is_called_but_not_scored(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    uncounted = {**batch, "image": {**batch["image"], "counted": False, "num_replaced": 2}}
    loss, _, log = criterion_of(task)(model, uncounted)
    whole = criterion_of(task)(model, batch)[2]
    only = criterion_of(task)(model, {name: batch[name] for name in ("nsentences", "image")})[2]
    assert log.keys() == whole.keys()  # ranks add theirs up, of which each may leave out another modality
    assert int(log["image_targets"]) == 0 and float(log["image_loss"]) == 0 == log["num_replaced"]
    for key in ("moe_load", "moe_dropped", "moe_entropy_sum", "moe_subtokens", "ntokens"):
        assert torch.allclose(torch.as_tensor(log[key] + only[key]), torch.as_tensor(whole[key])), key
    others = auxiliary(model, {name: batch[name] for name in ("text", "pair")})
    for key, value in zip(("gate_loss", "z_loss"), others):
        assert float(log[key]) == pytest.approx(6 * value, rel=1e-5)
    assert torch.isfinite(loss)
    with metrics.aggregate(new_root=True) as found:
        masked.MaskedMultimodalCriterion.reduce_metrics([log])
        assert "image_loss" not in found.get_smoothed_values()


def test_a_batch_of_which_nothing_is_counted(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    uncounted = {name: {**batch[name], "counted": False} for name in ("image", "text", "pair")}
    log = criterion_of(task)(model, {**batch, **uncounted})[2]
    assert log["ntokens"] == 0 and not log["moe_load"].any() and float(log["gate_loss"]) == 0


def test_some_modalities_only(data: Path) -> None:
    task = build_task(data, modalities="text")
    assert task.num_visual_tokens == 0
    model, batch = build_model(task, "dense_beit3_tiny"), batch_of(task)
    loss, sample_size, log = criterion_of(task)(model, batch)
    assert (loss / sample_size).item() == pytest.approx(float(log["text_loss"] / log["text_targets"]), rel=1e-6)
    assert not any(key.startswith(("image", "pair", "moe", "gate")) for key in log)


def test_samples_that_stand_for_bad_images_are_counted(data: Path) -> None:
    task = build_task(data)
    model, batch = build_model(task), batch_of(task)
    log = criterion_of(task)(model, {**batch, "pair": {**batch["pair"], "num_replaced": 2}})[2]
    with metrics.aggregate(new_root=True) as found:
        masked.MaskedMultimodalCriterion.reduce_metrics([log, log])
        assert found.get_smoothed_values()["replaced"] == 4
        masked.MaskedMultimodalCriterion.reduce_metrics([criterion_of(task)(model, batch)[2]])
        assert found.get_smoothed_values()["replaced"] == 4


def model_of(**flags: Any) -> torch.nn.Module:
    flags = {"mhmoe_modality_experts": "separate", "moe_expert_count": 4, "encoder_layers": 4, **flags}
    return small_beit3(**flags).double().eval()


@torch.no_grad()
def outputs_of(model: torch.nn.Module, kind: str, lengths: list[int]) -> list[MHMoEOutput]:
    return [output for output in model(**beit3_batch(kind, lengths))[1]["moe"] if output is not None]


@torch.no_grad()
def log_of(model: torch.nn.Module, kind: str, lengths: list[int]) -> dict[str, Any]:
    extra = model(**beit3_batch(kind, lengths))[1]
    return MoECriterion(None, GateLossConfig()).add_gate_losses(torch.zeros(()), [extra], 1)[1]


def logged(*logs: dict[str, Any]) -> dict[str, float]:
    with metrics.aggregate(new_root=True) as found:
        for log in logs:
            log_layers([log], 1)
        return {key: float(value) for key, value in found.get_smoothed_values().items()}


def test_uniform_pools_are_balanced_whatever_their_shares() -> None:
    model = model_of(moe_top_k=4)  # every sub-token goes to all experts of its pool
    assert IMAGE_POSITIONS == 5
    few_words = logged(log_of(model, "pair", [1]))
    assert (few_words["moe_load_max"], few_words["moe_active"]) == (1, 1)
    few_patches = logged(log_of(model, "pair", [1]), log_of(model, "text", [12] * 100))
    assert (few_patches["moe_load_max"], few_patches["moe_active"]) == (1, 1)


def test_figures_are_means_over_the_pools_of_all_layers() -> None:
    model = model_of(moe_top_k=1, mhmoe_routing="capacity", moe_eval_capacity_token_fraction=0.05)
    values = logged(log_of(model, "pair", [9, 2, 1]))
    pools = [
        RoutingStats(*(count[pool] for count in layer.stats))
        for layer in outputs_of(model, "pair", [9, 2, 1])
        for pool in (0, 1)
    ]
    expected = {
        "moe_active": [active_share(pool.expert_load) for pool in pools],
        "moe_load_max": [load_max_over_mean(pool.expert_load) for pool in pools],
        "moe_overflow": [pool.dropped / pool.expert_load.sum() for pool in pools],
        "moe_entropy": [pool.entropy / pool.num_subtokens for pool in pools],
    }
    for name, figures in expected.items():
        assert values[name] == pytest.approx(float(sum(figures)) / 4, abs=1e-4), name
    assert values["moe_overflow"] > 0


def test_a_pool_without_positions_is_in_no_figure() -> None:
    model = model_of(moe_top_k=4)
    values = logged(log_of(model, "image", [1, 1]))
    assert (values["moe_load_max"], values["moe_active"]) == (1, 1)
    stats = [layer.stats for layer in outputs_of(model, "image", [1, 1])]
    entropy = [float(layer.entropy[0] / layer.num_subtokens[0]) for layer in stats]
    assert values["moe_entropy"] == pytest.approx(sum(entropy) / 2, abs=1e-4)

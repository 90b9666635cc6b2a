"""The fine-tuning tasks on images: flags, what a split holds, heads, learning rates, bad data."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from beit3_models import SMALL
from fairseq.logging import metrics
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fine_tuning_data import ANSWERS, TASKS, write_fine_tuning_data
from images_and_words import IMG_SIZE, PATCH_SIZE

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.criterions.base import GateLossConfig
from mhmoe_fairseq.criterions.finetuning import RetrievalCriterion
from mhmoe_fairseq.data.images.reading import read_image
from mhmoe_fairseq.data.images.transforms import IMAGENET, EvaluationTransform
from mhmoe_fairseq.data.multimodal.index import index_files, write_index
from mhmoe_fairseq.metrics.recall import recalls
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import TEXT_POSITIONS
from mhmoe_fairseq.models.heads import CenteredLayerNorm
from mhmoe_fairseq.training.expert_state import notes_of

SHAPES = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "max_text_length": 16}
OWN_FLAGS = {"layer_decay": 1.0, "head_lr_multiplier": 1.0, "randaug": False, "no_flip": False}
OUTER = {
    "tpu": False, "no_save": True, "seed": 1, "save_dir": "", "restore_file": "checkpoint_last.pt",
    "finetune_from_model": None, "optimizer_config": Namespace(_name="mhmoe_adam"), "fp16": False,
    "memory_efficient_fp16": False, "fp16_no_flatten_grads": False, "zero_sharding": "none",
    "ddp_backend": "legacy_ddp",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fine_tuning_data(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "data")


def build(name: str, data: Path, **flags: Any) -> Any:
    config = TASK_DATACLASS_REGISTRY[name](data=str(data), **SHAPES)
    return TASK_REGISTRY[name].setup_task(Namespace(**{**vars(config), **OUTER, **flags}))


def build_model(
    task: Any, arch: str = "mhmoe_beit3_tiny", from_checkpoint: bool = False, sizes: dict[str, int] | None = None
) -> Any:
    flags = {**SMALL, **SHAPES, **(sizes or {}), "mhmoe_budget": "none", "dropout": 0.0}
    options = architecture_options(arch, **flags)
    return task.build_model(Namespace(**{**vars(options), "arch": arch}), from_checkpoint)


@pytest.mark.parametrize("name", ["mhmoe_vqa", "mhmoe_nlvr2", "mhmoe_image_classification"])
@pytest.mark.parametrize("wanted", [False, True])
def test_center_features_is_of_every_head_on_one_vector(data: Path, name: str, wanted: bool) -> None:
    modules = build(name, data, center_features=wanted).build_head(8).modules()
    assert any(isinstance(module, CenteredLayerNorm) for module in modules) is wanted


def test_a_retrieval_set_that_there_is_not(data: Path) -> None:
    with pytest.raises(UserError, match=r"--retrieval-set \(coco\) must be one of coco_retrieval, flickr30k"):
        build("mhmoe_retrieval", data, retrieval_set="coco")


def batches(task: Any, split: str, epoch: int = 1) -> list[dict[str, Any]]:
    """As fairseq makes them: with its own default of batches of multiples of 8, which not all splits allow."""
    task.load_dataset(split)
    iterator = task.get_batch_iterator(
        task.dataset(split), max_sentences=7, required_batch_size_multiple=8, seed=1, epoch=epoch
    )
    return list(iterator.next_epoch_itr(shuffle=False))


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    return all(
        a["id"].tolist() == b["id"].tolist() and torch.equal(a["net_input"]["images"], b["net_input"]["images"])
        for a, b in zip(one, two, strict=True)
    )


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_flags_have_defaults_that_change_nothing_and_help(name: str) -> None:
    fields = TASK_DATACLASS_REGISTRY[name].__dataclass_fields__
    assert {flag: fields[flag].default for flag in OWN_FLAGS} == OWN_FLAGS
    assert all(fields[flag].metadata["help"] for flag in OWN_FLAGS)


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", TASKS)
def test_validation_is_the_same_every_time_in_order_and_whole(name: str, data: Path) -> None:
    """unilm builds its validation loader as one for training: random crops, shuffled, the last batch dropped."""
    first, again = (
        batches(build(name, data), "valid"),
        batches(build(name, data, seed=5, randaug=True), "valid", epoch=3),
    )
    assert same(first, again)
    index = build(name, data).read_index("valid")
    rows = [row for batch in first for row in batch["id"].tolist()]
    assert rows == list(range(len(index))) and len(rows) % 7 and len(rows) % 8 != 7
    whole = EvaluationTransform(IMG_SIZE)(read_image(data / index["image_path"][0]))
    assert torch.equal(first[0]["net_input"]["images"][0], whole)


@pytest.mark.parametrize("name", TASKS)
def test_training_has_other_crops_and_another_order_in_every_epoch(name: str, data: Path) -> None:
    first, again, later = (batches(build(name, data), "train", epoch) for epoch in (1, 1, 2))
    assert same(first, again) and not same(first, later)
    rows = [[row for batch in epoch for row in batch["id"].tolist()] for epoch in (first, later)]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1]) == list(range(len(rows[0])))


def test_no_flip_leaves_out_the_mirror_only(data: Path) -> None:
    crops, unmirrored = (
        torch.cat(
            [batch["net_input"]["images"] for batch in batches(build("mhmoe_vqa", data, no_flip=no_flip), "train")]
        )
        for no_flip in (False, True)
    )
    is_same = (crops == unmirrored).flatten(1).all(1)
    is_mirrored = (crops.flip(3) == unmirrored).flatten(1).all(1)
    assert bool((is_same | is_mirrored).all()) and 0.3 < is_mirrored.double().mean() < 0.7


def test_randaug_changes_images_of_training(data: Path) -> None:
    plain, changed = (batches(build("mhmoe_nlvr2", data, randaug=randaug), "train") for randaug in (False, True))
    assert not same(plain, changed)


def test_imagenets_own_views(data: Path) -> None:
    name = "mhmoe_image_classification"
    plain, own = (batches(build(name, data, imagenet_views=on), "valid") for on in (False, True))
    side = IMG_SIZE * 7 // 8
    start = (IMG_SIZE - side) // 2
    image = read_image(data / build(name, data).read_index("valid")["image_path"][0])
    central = EvaluationTransform(IMG_SIZE, by=IMAGENET)(image.crop((start, start, start + side, start + side)))
    assert torch.equal(own[0]["net_input"]["images"][0], central) and not same(plain, own)
    crops = [batches(build(name, data, imagenet_views=on), "train") for on in (False, True)]
    assert not same(*crops)


@pytest.mark.parametrize(
    "name, task, without",
    [("mhmoe_vqa", "vqa", {"labels": [], "scores": []}), ("mhmoe_nlvr2", "nlvr2", {"label": None})],
)
def test_a_split_without_labels_is_for_predictions_only(name: str, task: str, without: dict, copied: Path) -> None:
    index = build(name, copied).read_index("valid")
    rows = [{**index.record(row), **without} for row in range(len(index))]
    write_index(index_files(copied, task, "valid")[0], task, rows)
    with pytest.raises(UserError, match="has no labels to train on or to score by: only mhmoe evaluate reads it"):
        build(name, copied).load_dataset("valid")
    dataset = build(name, copied).read_split("valid")
    assert dataset.collater([dataset[0], dataset[1]])["targets"] is None


def test_a_broken_line_is_named(copied: Path) -> None:
    file = index_files(copied, "vqa", "train")[0]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]))
    with pytest.raises(UserError, match=r"vqa.train.jsonl:5: not valid JSON"):
        build("mhmoe_vqa", copied).load_dataset("train")


def test_flickrs_files_are_read_where_they_are_asked_for(copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match="flickr30k.train.jsonl"):
        build("mhmoe_retrieval", copied, retrieval_set="flickr30k").load_dataset("train")
    for file in copied.glob("coco_retrieval.*"):
        file.rename(copied / file.name.replace("coco_retrieval", "flickr30k"))
    task = build("mhmoe_retrieval", copied)
    task.load_dataset("train")
    assert len(task.dataset("train")) == 96


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize("name", ["mhmoe_vqa", "mhmoe_image_classification"])
def test_a_checkpoint_keeps_the_classes_names(name: str, data: Path) -> None:
    task = build(name, data)
    saved = task.state_dict()
    assert saved == {"classes": ANSWERS}
    build(name, data).load_state_dict(saved)
    with pytest.raises(UserError, match="has the classes red, green, .*; the checkpoint's are green, red"):
        task.load_state_dict({"classes": ["green", "red", *ANSWERS[2:]]})


@pytest.mark.parametrize(
    "names, num_classes, message",
    [
        (None, None, "--num-classes is missing, and so is .*imagenet.classes.json"),
        (["cat", "dog"], 3, r"--num-classes \(3\): .* names 2 classes"),
        ({"0": "cat"}, None, "must be a JSON list of the classes' names"),
        (["cat"], None, r"--num-classes \(1\) must be at least 2"),
        (["cat", "dog"], None, r"class \d, there are 2 classes"),
    ],
)
def test_bad_classes_are_refused(copied: Path, names: Any, num_classes: int | None, message: str) -> None:
    (copied / "imagenet.classes.json").unlink()
    if names is not None:
        (copied / "imagenet.classes.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=message):
        build("mhmoe_image_classification", copied, num_classes=num_classes).load_dataset("train")


def test_classes_may_be_numbers(copied: Path) -> None:
    (copied / "imagenet.classes.json").unlink()
    assert build("mhmoe_image_classification", copied, num_classes=7).classes == list("0123456")


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", TASKS)
def test_the_head_is_new_to_a_pre_trained_checkpoint_and_no_other(name: str, data: Path) -> None:
    task = build(name, data)
    model = build_model(task)
    assert list(model.heads) == [task.head_name]
    pretrained = {key: value for key, value in model.state_dict().items() if not key.startswith("heads.")}
    other = build_model(task)
    own = {key: value.clone() for key, value in other.heads.state_dict().items()}
    other.load_state_dict(pretrained)
    assert all(torch.equal(own[key], value) for key, value in other.heads.state_dict().items())
    with pytest.raises(RuntimeError, match=f"heads.{task.head_name}"):
        build_model(task, from_checkpoint=True).load_state_dict(pretrained)


@pytest.fixture
def interrupted(data: Path, tmp_path: Path) -> Path:
    """``checkpoint_last.pt`` of a run with the optimizer's state."""
    state = build_model(build("mhmoe_vqa", data)).state_dict()
    saved = {"model": state, "cfg": {}, "last_optimizer_state": {"state": {}, "param_groups": []}}
    torch.save(saved, tmp_path / "checkpoint_last.pt")
    return tmp_path / "checkpoint_last.pt"


@pytest.mark.parametrize(
    "flag, value, positions",
    [
        ("img_size", 2 * IMG_SIZE, "64 patches, {} has them for 16,"),
        ("max_text_length", 9, "9 tokens, {} has them for 16,"),
    ],
)
def test_a_run_is_not_resumed_with_other_positions(
    flag: str, value: int, positions: str, data: Path, interrupted: Path, tmp_path: Path
) -> None:
    """Adam's moments are not resized: the first update would fail."""
    message = rf"--{flag.replace('_', '-')} \({value}\): .*{positions}".format(re.escape(str(interrupted)))
    changed = {flag: value, "reset_optimizer": False}
    for where in ({"save_dir": str(tmp_path)}, {"restore_file": str(interrupted)}):
        with pytest.raises(UserError, match=f"{message}.*--finetune-from-model"):
            build_model(build("mhmoe_vqa", data, **changed, **where), sizes={flag: value})
        build_model(build("mhmoe_vqa", data, **{**changed, "reset_optimizer": True}, **where), sizes={flag: value})
        build_model(build("mhmoe_vqa", data, reset_optimizer=False, **where))
    fresh = {"finetune_from_model": str(interrupted), "save_dir": str(tmp_path / "other")}
    build_model(build("mhmoe_vqa", data, **changed, **fresh), sizes={flag: value})


def test_a_run_is_not_resumed_with_longer_texts(data: Path, interrupted: Path, tmp_path: Path) -> None:
    task = build("mhmoe_vqa", data, max_text_length=20, reset_optimizer=False, save_dir=str(tmp_path))
    with pytest.raises(UserError, match="20 tokens, .* has them for 16, .*as in its training$"):
        build_model(task, sizes={"max_text_length": 20})


def test_weights_without_an_optimizers_state_may_be_resized(data: Path, interrupted: Path, tmp_path: Path) -> None:
    saved = torch.load(interrupted, weights_only=True)
    torch.save({**saved, "last_optimizer_state": None}, interrupted)
    task = build("mhmoe_vqa", data, max_text_length=9, reset_optimizer=False, save_dir=str(tmp_path))
    assert build_model(task, sizes={"max_text_length": 9}).get_parameter(TEXT_POSITIONS).size(0) == 9 + 2


def test_layers_learn_at_their_own_rates(data: Path) -> None:
    model = build_model(build("mhmoe_vqa", data, layer_decay=0.5, head_lr_multiplier=20.0))
    scales = {name: notes_of(parameter).lr_scale for name, parameter in model.named_parameters()}
    found: dict[float, set[str]] = {}
    for name, scale in scales.items():
        parts = name.split(".")
        kind = ".".join(parts[1:4]) if "layers" in parts else parts[1] if parts[1] != "encoder" else parts[2]
        found.setdefault(scale, set()).add(kind)
    assert found[0.125] == {"text_embed", "vision_embed", "embed_positions"}
    assert found[0.25] == {"encoder.layers.0"} and found[0.5] == {"encoder.layers.1"}
    assert {kind for kind in found[1.0]} == {"layer_norm", "weight", "bias"}  # the final norm, and the words' scores
    assert found[20.0] == {"vqa"}


def test_rates_are_refused_in_training_where_the_optimizer_has_one(data: Path) -> None:
    task = build("mhmoe_nlvr2", data, layer_decay=0.9, optimizer_config=Namespace(_name="adam"))
    with pytest.raises(UserError, match=r"--layer-decay: --optimizer \(adam\) must be mhmoe_adam"):
        build_model(task)
    model = build_model(task, from_checkpoint=True)
    assert {notes_of(parameter).lr_scale for parameter in model.parameters()} == {1.0}


# ---------------------------------------------------------------------- recall


def test_recall_of_a_validation_is_that_of_the_whole_set(data: Path) -> None:
    task = build("mhmoe_retrieval", data)
    model, criterion = build_model(task).eval(), RetrievalCriterion(task, GateLossConfig())
    found = batches(task, "valid")
    with metrics.aggregate(new_root=True) as aggregator:
        for batch in [*found, found[0]]:  # a rank that has run out repeats its first batch
            log = task.valid_step(batch, model, criterion)[2]
            task.reduce_metrics([log], criterion)
    values = aggregator.get_smoothed_values()
    with torch.no_grad():
        images, texts = (
            torch.cat([model(**{key: batch["net_input"][key]}, head="retrieval")[0] for batch in found])
            for key in ("images", "text_tokens")
        )
    expected = recalls(images, texts, torch.arange(len(texts)))
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=0.01)
    assert "_vectors" not in values

"""The task of masked data modelling: flags, checks before training, what a split holds."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.utils import apply_to_sample
from images_and_words import COUNTS, IMG_SIZE, PATCH_SIZE, write_images_and_words, write_tokenizer
from PIL import Image

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.images.reading import read_image
from mhmoe_fairseq.data.images.transforms import EvaluationViews
from mhmoe_fairseq.data.multimodal.index import read_index
from mhmoe_fairseq.data.multimodal.masking import masked_count
from mhmoe_fairseq.tasks.masked_multimodal import MaskedMultimodalTask, MaskedMultimodalTaskConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "data")


def build(data: Path, **flags: Any) -> MaskedMultimodalTask:
    config = MaskedMultimodalTaskConfig(data=str(data), img_size=IMG_SIZE, patch_size=PATCH_SIZE, max_text_length=16)
    defaults = {
        **vars(config),
        "tpu": False,
        "no_save": True,
        "seed": 1,
        "save_dir": "",
        "restore_file": "checkpoint_last.pt",
    }
    return MaskedMultimodalTask.setup_task(Namespace(**{**defaults, **flags}))


def load(task: MaskedMultimodalTask, split: str, epoch: int = 1) -> list[dict[str, Any]]:
    """The batches of an epoch, of four samples each."""
    task.load_dataset(split)
    dataset = task.dataset(split)
    dataset.set_epoch(epoch)
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_sentences=4)
    return [dataset.collater([dataset[index] for index in batch]) for batch in batches]


def tensors(batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    keys = ("images", "masked_patches", "text_tokens")
    inputs = [batch[name]["net_input"] for batch in batches for name in ("image", "text", "pair")]
    return [value for given in inputs for key in keys if (value := given.get(key)) is not None]


# ---------------------------------------------------------------------- batches


def test_every_batch_has_all_modalities(data: Path) -> None:
    batches = load(build(data), "train")
    assert sum(batch["nsentences"] for batch in batches) == max(COUNTS["train"].values())
    patches = (IMG_SIZE // PATCH_SIZE) ** 2
    for batch in batches:
        assert batch["image"]["net_input"]["images"].shape == (4, 3, IMG_SIZE, IMG_SIZE)
        assert batch["image"]["net_input"]["masked_patches"].sum(1).tolist() == [round(0.4 * patches)] * 4
        assert batch["pair"]["net_input"]["masked_patches"].shape == (4, patches)
        assert batch["text"]["net_input"].get("images") is None
        assert batch["pair"]["text_targets"].shape == batch["pair"]["net_input"]["text_tokens"].shape


DEFAULT_SHARES = {"image_mask_prob": 0.4, "text_mask_prob": 0.15, "pair_text_mask_prob": 0.5}
OTHER_SHARES = {"image_mask_prob": 0.25, "text_mask_prob": 0.34, "pair_text_mask_prob": 0.8}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("flags", [{}, OTHER_SHARES], ids=["default", "given"])
def test_each_modality_masks_the_share_of_its_flag(data: Path, flags: dict[str, float], split: str) -> None:
    shares = flags or DEFAULT_SHARES
    patches = (IMG_SIZE // PATCH_SIZE) ** 2
    for batch in load(build(data, **flags), split):
        for name in ("image", "pair"):
            masked = batch[name]["net_input"]["masked_patches"].sum(1).tolist()
            assert set(masked) == {masked_count(patches, shares["image_mask_prob"])}
        for name, flag in (("text", "text_mask_prob"), ("pair", "pair_text_mask_prob")):
            tokens, targets = batch[name]["net_input"]["text_tokens"], batch[name]["text_targets"]
            words = (tokens.ne(1).sum(1) - 2).tolist()  # without <s> and </s>
            assert targets.ne(1).sum(1).tolist() == [masked_count(count, shares[flag]) for count in words]


@pytest.mark.parametrize("name", ["image", "pair"])
def test_training_crops_and_jitters_and_a_held_out_set_shows_whole_images(data: Path, name: str) -> None:
    whole = {}
    for split in ("train", "valid"):
        index = read_index(data, name, split)
        views = EvaluationViews(IMG_SIZE, IMG_SIZE)
        whole[split] = [views(read_image(data / path))[0] for path in index["image_path"]]
    seen = {split: [batch[name] for batch in load(build(data), split) if batch[name].get("counted", True)]
            for split in whole}  # fmt: skip
    for split, batches in seen.items():
        for batch in batches:
            for row, image in zip(batch["id"].tolist(), batch["net_input"]["images"]):
                assert torch.equal(image, whole[split][row]) == (split == "valid")


def test_masks_follow_from_seed_and_epoch(data: Path) -> None:
    first, again = tensors(load(build(data), "train", 2)), tensors(load(build(data), "train", 2))
    assert all(map(torch.equal, first, again))
    for other in (load(build(data), "train", 3), load(build(data, seed=2), "train", 2)):
        assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, tensors(other)))


def test_held_out_masks_depend_on_neither_seed_nor_epoch(data: Path) -> None:
    first, other = tensors(load(build(data), "valid", 1)), tensors(load(build(data, seed=2), "valid", 5))
    assert all(map(torch.equal, first, other))


def test_held_out_samples_count_once(data: Path) -> None:
    ids: dict[str, list[int]] = {"image": [], "text": [], "pair": []}
    for batch in load(build(data), "valid"):
        for name, seen in ids.items():
            if batch[name]["counted"]:
                seen += batch[name]["id"].tolist()
    assert {name: sorted(seen) for name, seen in ids.items()} == {
        name: list(range(count)) for name, count in COUNTS["valid"].items()
    }


def test_targets_are_the_ids_of_the_same_crop(data: Path) -> None:
    task = build(data)
    batch = load(task, "train")[0]["pair"]
    targets = task.image_targets(batch)
    assert targets.shape == batch["net_input"]["masked_patches"].shape and targets.dtype == torch.long
    views = batch["net_input"]["images"] * 0.5 + 0.5  # both views have one size here, so they are the same pixels
    assert torch.allclose(views, batch["tokenizer_images"].float() / 255, atol=1e-6)
    assert torch.equal(targets, task.visual_tokenizer.encode(batch["tokenizer_images"] / 255))
    assert not targets.requires_grad and 0 <= int(targets.min()) and int(targets.max()) < task.num_visual_tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_do_not_depend_on_the_trainers_precision(data: Path, dtype: torch.dtype) -> None:
    """fairseq turns every float32 tensor of a batch into one of half precision before the task sees it."""
    task = build(data)
    batch = load(task, "train")[0]["image"]
    halved = apply_to_sample(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor, batch)
    assert halved["net_input"]["images"].dtype == dtype
    assert halved["tokenizer_images"].dtype == torch.uint8
    assert torch.equal(halved["tokenizer_images"], batch["tokenizer_images"])
    assert torch.equal(task.image_targets(halved), task.image_targets(batch))


def test_the_tokenizer_may_look_at_another_resolution(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "larger.pt"
    write_tokenizer(file, data, image_size=2 * IMG_SIZE)
    task = build(data, visual_tokenizer=str(file), patch_size=PATCH_SIZE // 2)
    batch = load(task, "valid")[0]["image"]
    assert batch["tokenizer_images"].shape[-1] == 2 * IMG_SIZE
    assert task.image_targets(batch).shape == batch["net_input"]["masked_patches"].shape == (2, 64)


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"img_size": 30}, r"--img-size \(30\) must be a multiple of --patch-size \(8\)"),
        ({"patch_size": 0}, r"--patch-size \(0\) must be at least 1"),
        ({"max_text_length": 2}, r"--max-text-length \(2\) must be at least 3"),
        ({"modalities": "image,sound"}, r"--modalities \(image,sound\) must be some of image,text,pair"),
        ({"modalities": "text,text"}, "each once"),
        ({"modalities": ""}, r"--modalities \(\) must be"),
        ({"image_mask_prob": 1.0}, r"--image-mask-prob \(1.0\) must be"),
        ({"text_mask_prob": 0.0}, r"--text-mask-prob \(0.0\) must be"),
        ({"tpu": True}, "--bf16"),
        ({"modalities": "text", "visual_tokenizer": "x.pt"}, r"--visual-tokenizer \(x.pt\) .* --modalities \(text\)"),
    ],
)
def test_bad_flags_are_refused(data: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(data, **flags)


def test_another_grid_is_refused_with_both_flags(data: Path) -> None:
    with pytest.raises(UserError, match=r"--visual-tokenizer .* 4 x 4 ids .* --img-size \(32\) and --patch-size \(4\)"):
        _ = build(data, patch_size=4).num_visual_tokens


def test_a_folder_that_is_none_of_images_and_text(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build(tmp_path / "nothing")
    (copied / "manifest.json").write_text(json.dumps({"kind": "classification"}))
    with pytest.raises(UserError, match="holds classification data: .* mhmoe prepare image-text"):
        build(copied)
    (copied / "manifest.json").unlink()
    lines = (copied / "dict.txt").read_text().splitlines()
    (copied / "dict.txt").write_text("".join(f"{line}\n" for line in lines if not line.startswith("<mask>")))
    with pytest.raises(UserError, match="<mask>"):
        build(copied)


@pytest.mark.parametrize("missing", ["image.valid.jsonl", "text/valid.idx", "pair.valid.jsonl", "visual_tokenizer.pt"])
def test_a_missing_file_is_named(copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    with pytest.raises((FileNotFoundError, UserError), match=missing.rpartition("/")[2]):
        build(copied).load_dataset("valid")


def test_left_out_modalities_need_no_files(copied: Path) -> None:
    for file in (*copied.glob("image.*"), *copied.glob("pair.*"), copied / "visual_tokenizer.pt"):
        file.unlink()
    task = build(copied, modalities="text")
    task.load_dataset("train")
    assert (len(task.dataset("train")), task.num_visual_tokens) == (COUNTS["train"]["text"], 0)


def test_a_bad_image_is_refused_or_replaced(copied: Path) -> None:
    (copied / "images" / "train-3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image.train.jsonl:4: .*train-3.png"):
        load(build(copied), "train")
    replaced = [batch["image"]["num_replaced"] for batch in load(build(copied, skip_bad_pictures=True), "train")]
    assert 2 <= sum(replaced) <= 3  # 24 items, 10 images
    Image.new("RGB", (IMG_SIZE, IMG_SIZE)).save(copied / "images" / "train-3.png")
    assert sum(batch["image"]["num_replaced"] for batch in load(build(copied), "train")) == 0


# ---------------------------------------------------------------------- the visual tokenizer of a checkpoint


def test_a_checkpoint_knows_its_visual_tokenizer(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    write_tokenizer(file, data, seed=2)
    task, other = build(data), build(data, visual_tokenizer=str(file))
    assert task.state_dict() == build(data).state_dict() != other.state_dict()
    task.load_state_dict(build(data).state_dict())
    with pytest.raises(UserError, match=r"--visual-tokenizer .* is not the one that the checkpoint was trained with"):
        other.load_state_dict(task.state_dict())
    build(data, modalities="text").load_state_dict(task.state_dict())

"""A small prepared folder of images and texts, in the layout of ``mhmoe prepare image-text``, made in an instant.

An image has two rectangles, its text names them from left to right: what is masked in one can be told from the other.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from console import USER_DIR
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_tensor

from mhmoe_fairseq.data.multimodal.index import write_index
from mhmoe_fairseq.data.visual_tokenizers.base import to_patches
from mhmoe_fairseq.prepare.visual_tokenizers.fitting import fit_patch_kmeans
from mhmoe_fairseq.prepare.visual_tokenizers.settings import KMeansSettings

COLOURS = {
    "red": (210, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40),
    "black": (15, 15, 15), "grey": (128, 128, 128),
}  # fmt: skip
SIZES = ("small", "large")
WORDS = ("a", "the", "and", "beside", "square", "is", *SIZES, *COLOURS)
IMG_SIZE, PATCH_SIZE = 32, 8
CODES = 12
COUNTS = {"train": {"image": 10, "text": 24, "pair": 16}, "valid": {"image": 5, "text": 12, "pair": 9}}
SHAPES = ("--img-size", IMG_SIZE, "--patch-size", PATCH_SIZE, "--max-text-length", 16)


def build_dictionary() -> Dictionary:
    dictionary = Dictionary()
    for word in (*WORDS, "<mask>"):
        dictionary.add_symbol(word)
    return dictionary


def write_images_and_words(folder: Path, counts: dict[str, dict[str, int]] | None = None) -> Path:
    """Dictionary, images, indexes, texts and a visual tokenizer for pre-training; the folder."""
    folder.mkdir(parents=True)
    dictionary = build_dictionary()
    dictionary.save(str(folder / "dict.txt"))
    counts = {**(counts or COUNTS)}
    counts.setdefault("test", counts["valid"])
    generator = random.Random(0)
    for split, numbers in counts.items():
        write_index(folder / f"image.{split}.jsonl", "image", _images(folder, split, numbers["image"], generator))
        pairs = [
            {**record, "text_segment": ids(dictionary, text), "image_id": number}
            for number, (record, text) in enumerate(_captioned(folder, split, numbers["pair"], generator))
        ]
        write_index(folder / f"pair.{split}.jsonl", "pair", pairs)
        _write_texts(folder / "text", split, [ids(dictionary, sentence(generator)) for _ in range(numbers["text"])])
    write_tokenizer(folder / "visual_tokenizer.pt", folder)
    return folder


def write_tokenizer(path: Path, folder: Path, seed: int = 1, image_size: int = IMG_SIZE) -> None:
    """Fit codes to the training images."""
    opened = [Image.open(file) for file in sorted((folder / "images").glob("train-*.png"))]
    images = torch.stack([to_tensor(image.resize((image_size, image_size))) for image in opened])
    patches = to_patches(images, PATCH_SIZE).flatten(0, 1)
    patches = patches + 0.01 * torch.rand(patches.shape, generator=torch.Generator().manual_seed(seed))
    settings = KMeansSettings(CODES, PATCH_SIZE, image_size, seed, iterations=5)
    fit_patch_kmeans(patches.clamp(0, 1), settings).save(path)


def sentence(generator: random.Random) -> str:
    first, second = (_rectangle(generator) for _ in range(2))
    return generator.choice([_describe(first, second), f"the square is {first[1]}"])


def ids(dictionary: Dictionary, text: str) -> list[int]:
    return [dictionary.index(word) for word in text.split()]


def _rectangle(generator: random.Random) -> tuple[str, str]:
    return generator.choice(SIZES), generator.choice(list(COLOURS))


def _describe(first: tuple[str, str], second: tuple[str, str]) -> str:
    return f"a {' '.join(first)} square beside a {' '.join(second)} square"


def _captioned(folder: Path, split: str, count: int, generator: random.Random) -> list[tuple[dict[str, Any], str]]:
    made = []
    for number in range(count):
        rectangles = [_rectangle(generator) for _ in range(2)]
        path = f"images/{split}-pair-{number}.png"
        _draw(folder / path, rectangles)
        made.append(({"image_path": path}, _describe(*rectangles)))
    return made


def _images(folder: Path, split: str, count: int, generator: random.Random) -> list[dict[str, Any]]:
    records = []
    for number in range(count):
        path = f"images/{split}-{number}.png"
        _draw(folder / path, [_rectangle(generator) for _ in range(2)])
        records.append({"image_path": path})
    return records


def _draw(path: Path, rectangles: list[tuple[str, str]]) -> None:
    image = Image.new("RGB", (IMG_SIZE, IMG_SIZE), "white")
    brush = ImageDraw.Draw(image)
    for place, (size, colour) in enumerate(rectangles):
        side = 14 if size == "large" else 7
        left = place * IMG_SIZE // 2 + 1
        brush.rectangle([left, 8, left + side, 8 + side], fill=COLOURS[colour])
    path.parent.mkdir(exist_ok=True)
    image.save(path)


def _write_texts(folder: Path, split: str, lines: list[list[int]]) -> None:
    folder.mkdir(exist_ok=True)
    builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
    for line in lines:
        builder.add_item(torch.tensor([*line, build_dictionary().eos()]))
    builder.finalize(str(folder / f"{split}.idx"))


def training_words(data: Path, save_dir: Path, *flags: object, updates: int) -> list[object]:
    """The words of ``fairseq-train`` for a small MH-MoE model that is pre-trained on such a folder.

    Later flags win over earlier ones.
    """
    return [
        data, "--user-dir", USER_DIR, "--task", "mhmoe_masked_multimodal", "--criterion", "mhmoe_masked_multimodal",
        "--arch", "mhmoe_beit3_tiny", *SHAPES, "--encoder-layers", 2, "--encoder-embed-dim", 32,
        "--encoder-attention-heads", 2, "--encoder-ffn-embed-dim", 32, "--moe-freq", 2, "--moe-expert-count", 4,
        "--moe-ffn-dim", 16, "--mhmoe-heads-number", 2, "--moe-top-k", 2, "--dropout", 0, "--batch-size", 4,
        "--optimizer", "mhmoe_adam", "--lr", 0.003, "--lr-scheduler", "fixed", "--clip-norm", 1,
        "--max-update", updates, "--save-dir", save_dir, "--cpu", "--num-workers", 0, "--log-format", "json",
        "--log-interval", 1, "--no-epoch-checkpoints", *flags,
    ]  # fmt: skip

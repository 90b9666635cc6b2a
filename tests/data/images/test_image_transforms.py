"""From images to tensors: crops, views, colours, and that the generator alone decides."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mhmoe_fairseq.data.images import transforms
from mhmoe_fairseq.data.images.transforms import (
    IMAGENET,
    OPERATIONS,
    EvaluationTransform,
    EvaluationViews,
    PretrainingViews,
    TrainTransform,
    draw_crop,
    jitter_colours,
)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (200, 90), (2, 2), (640, 480)])
@pytest.mark.parametrize("min_scale", [0.2, 0.5])
def test_crops_lie_within_and_have_the_area_and_aspect(size, min_scale):
    width, height = size
    for seed in range(200):
        box = draw_crop(width, height, min_scale, rng(seed))
        assert 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
        assert box.height > 0 and box.width > 0
        if min(size) >= 64:
            slack = 1 / min(box.width, box.height)
            assert 0.75 * (1 - 2 * slack) <= box.width / box.height <= 4 / 3 * (1 + 2 * slack)
            assert box.width * box.height >= min(min_scale, 90 * 120 / (200 * 90)) * width * height * (1 - 3 * slack)


@pytest.mark.parametrize("size, expected", [((1000, 2), (0, 498, 2, 3)), ((2, 1000), (498, 0, 3, 2))])
def test_a_narrow_image_gives_its_middle(size, expected):
    assert tuple(draw_crop(*size, 0.5, rng(0))) == expected


def test_crops_vary_and_reach_the_edges():
    boxes = [draw_crop(64, 64, 0.5, rng(seed)) for seed in range(300)]
    assert len(set(boxes)) > 200
    assert min(box.left for box in boxes) == 0 and max(box.left + box.width for box in boxes) == 64
    assert min(box.width * box.height for box in boxes) < 0.55 * 64 * 64
    assert max(box.width * box.height for box in boxes) > 0.9 * 64 * 64


@pytest.mark.parametrize("sizes", [(32, 32), (32, 16), (16, 48)])
def test_both_views_are_of_one_crop_and_flip(sizes):
    """On a ramp the places of a view's edges can be read from its colours."""
    views = PretrainingViews(*sizes, jitter=0.0)
    flips = 0
    for seed in range(20):
        image, tokenizer_image = views(ramp(200, 150), rng(seed))
        assert image.shape == (3, sizes[0], sizes[0]) and tokenizer_image.shape == (3, sizes[1], sizes[1])
        assert 0 <= tokenizer_image.min() and tokenizer_image.max() <= 1 and image.min() >= -1
        grown = torch.nn.functional.interpolate(tokenizer_image[None], sizes[0], mode="bilinear", antialias=True)[0]
        assert (image * 0.5 + 0.5 - grown).abs().max() < 0.04
        flips += bool(image[0, 0, 0] > image[0, 0, -1])
    assert 3 <= flips <= 17


def area_of(view: torch.Tensor) -> float:
    """Which part of a ramp a view in [0, 1] shows; a little less than it does, for the pixels at its edges."""
    return float((view[0].max() - view[0].min()) * (view[1].max() - view[1].min()))


def test_views_for_pre_training_are_crops_of_a_fifth_to_all_of_the_area():
    views = PretrainingViews(32, 32, jitter=0.0, flip=False)
    areas = np.array([area_of(views(ramp(128, 128), rng(seed))[1]) for seed in range(200)])
    assert areas.min() < 0.26 and areas.max() > 0.9 and 0.45 < areas.mean() < 0.62


def test_views_for_pre_training_have_other_colours_by_default():
    grey = Image.new("RGB", (16, 16), (100, 100, 100))  # of the three adjustments only brightness changes a grey
    shades = np.array([float(PretrainingViews(8, 8)(grey, rng(seed))[1].mean()) * 255 for seed in range(200)])
    assert 59 <= shades.min() < 65 and 135 < shades.max() <= 141 and abs(shades.mean() - 100) < 5


@pytest.mark.parametrize("flip, share", [(True, 0.5), (False, 0.0)])
@pytest.mark.parametrize("make", [PretrainingViews, TrainTransform])
def test_half_of_the_views_are_flipped_if_asked_for(make, flip, share):
    views = make(8, 8, jitter=0.0, flip=flip) if make is PretrainingViews else make(8, flip=flip)
    flips = 0
    for seed in range(300):
        view = views(ramp(32, 32), rng(seed))
        image = view[0] if isinstance(view, tuple) else view
        flips += bool(image[0, 0, 0] > image[0, 0, -1])
    assert abs(flips / 300 - share) < 0.1


def test_crops_are_as_often_tall_as_wide_and_of_every_area():
    boxes = [draw_crop(1000, 1000, 0.2, rng(seed)) for seed in range(1500)]
    areas = np.array([box.width * box.height for box in boxes]) / 1e6
    aspects = np.log([box.width / box.height for box in boxes])[areas < 0.7]  # those always fit
    assert abs(aspects.mean()) < 0.02 and abs(aspects.std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    small = [int(((areas >= low) & (areas < low + 0.1)).sum()) for low in (0.2, 0.3, 0.4, 0.5, 0.6)]
    assert max(small) < 1.4 * min(small) and areas.max() > 0.95


def test_equal_sizes_are_equal_views():
    image, tokenizer_image = PretrainingViews(32, 32)(noise(50, 40), rng(1))
    assert torch.allclose(image * 0.5 + 0.5, tokenizer_image, atol=1e-6)


def test_evaluation_takes_the_whole_image_and_no_draw():
    drawn, generator = ramp(96, 64), rng(0)
    before = generator.bit_generator.state
    image, tokenizer_image = EvaluationViews(32, 16)(drawn, generator)
    assert generator.bit_generator.state == before
    expected = np.asarray(drawn.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    assert np.abs(tokenizer_image.numpy() - np.asarray(drawn.resize((16, 16), 3)).transpose(2, 0, 1) / 255).max() < 1e-6
    assert np.abs(image.permute(1, 2, 0).numpy() - (expected - 0.5) / 0.5).max() < 1e-6
    assert torch.equal(EvaluationTransform(32)(drawn), image)


def test_central_crop_and_other_normalisation():
    image = noise(80, 40)
    kept = image.crop((25, 5, 55, 35)).resize((16, 16), Image.Resampling.BICUBIC)  # 30 of 40 pixels
    expected = (np.asarray(kept) / 255 - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    view = EvaluationTransform(16, crop_fraction=0.75, by=IMAGENET)(image)
    assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_training_crops_at_least_half_and_flips_half():
    transform, flips = TrainTransform(32), 0
    for seed in range(40):
        view = transform(ramp(100, 100), rng(seed)) * 0.5 + 0.5
        spread = float((view[0].max() - view[0].min()) * (view[1].max() - view[1].min()))
        assert spread > 0.4  # of the ramp's range, so of the area: half, less a pixel at each edge
        flips += bool(view[0, 0, 0] > view[0, 0, -1])
    assert 10 <= flips <= 30
    for seed in range(10):
        view = TrainTransform(32, flip=False)(ramp(100, 100), rng(seed))
        assert view[0, 0, 0] < view[0, 0, -1]


@pytest.mark.parametrize(
    "transform",
    [PretrainingViews(32, 16), TrainTransform(32), TrainTransform(32, randaug=True)],
    ids=["views", "train", "randaug"],
)
def test_the_generator_alone_decides(transform):
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)  # these must not matter
        np.random.seed(seed)
        view = transform(noise(60, 50), rng(5))
        return view[0] if isinstance(view, tuple) else view

    assert torch.equal(drawn(1), drawn(2))
    other = transform(noise(60, 50), rng(6))
    assert not torch.equal(drawn(1), other[0] if isinstance(other, tuple) else other)


def test_colours_change_within_the_strength():
    flat = Image.new("RGB", (8, 8), (100, 100, 100))  # contrast and saturation leave a grey as it is
    shades = [np.asarray(jitter_colours(flat, 0.4, rng(seed)))[0, 0, 0] for seed in range(200)]
    assert min(shades) >= 59 and max(shades) <= 141 and max(shades) - min(shades) > 60


def test_brightness_contrast_and_saturation_change_once_each_in_any_order(monkeypatch):
    calls: list[tuple[str, float]] = []
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    for name in names:
        monkeypatch.setattr(transforms.F, name, lambda image, factor, name=name: calls.append((name, factor)) or image)
    image = noise(4, 4)
    orders = Counter()
    for seed in range(600):
        done = len(calls)
        jitter_colours(image, 0.4, rng(seed))
        orders[tuple(name for name, _ in calls[done:])] += 1
    assert len(orders) == 6 and all(set(order) == set(names) for order in orders) and min(orders.values()) > 70
    for name in names:
        factors = np.array([factor for called, factor in calls if called == name])
        assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.03


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_keep_the_size_and_do_what_they_are_called(name, sign):
    image = noise(32, 32).point(lambda value: 40 + value // 2)
    changed = OPERATIONS[name](image, 0.7, sign)
    assert changed.size == image.size and changed.mode == "RGB"
    assert (np.asarray(changed) == np.asarray(image)).all() == (name == "identity")
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        other = np.asarray(OPERATIONS[name](image, 0.7, -sign))
        assert not np.array_equal(np.asarray(changed), other)
        assert (np.asarray(changed) == 128).all(-1).any()  # what the image has left is grey


def test_shifts_are_a_share_of_the_side():
    image = noise(224, 224)
    shifted = np.asarray(OPERATIONS["translate_x"](image, 0.7, 1))
    assert np.array_equal(shifted[:, 7:], np.asarray(image)[:, :-7])  # 10 of 224 pixels times 0.7


def test_operations_by_their_own_scales():
    """At magnitude 7 of 10: 21 degrees of 30, 0.21 of a shear of 0.3, 1.36 of 0.1 to 1.9."""
    image, level, degrees = noise(64, 48), 0.7, math.degrees(math.atan(0.21))

    def turned(angle: float = 0.0, shear: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
        return transforms.F.affine(
            image, angle, [0, 0], 1.0, list(shear), transforms.InterpolationMode.BILINEAR, [128.0] * 3
        )

    expected = {
        "rotate": turned(21.0),
        "shear_x": turned(shear=(degrees, 0.0)),
        "shear_y": turned(shear=(0.0, degrees)),
        "brightness": transforms.F.adjust_brightness(image, 1.36),
        "sharpness": transforms.F.adjust_sharpness(image, 1.36),
    }
    for name, changed in expected.items():
        assert np.array_equal(np.asarray(OPERATIONS[name](image, level, 1)), np.asarray(changed)), name


def test_options_of_the_training_transform_have_their_effect():
    """The draws before them are the same, so crops and flips are."""
    image, changed = noise(40, 40), 0
    for seed in range(100):
        plain = TrainTransform(16)(image, rng(seed))
        other = TrainTransform(16, by=IMAGENET)(image, rng(seed))
        mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        assert torch.allclose(other, (plain * 0.5 + 0.5 - mean) / std, atol=1e-5)
        changed += not torch.equal(TrainTransform(16, randaug=True)(image, rng(seed)), plain)
    assert 50 < changed < 85  # two operations, each half of the time, one in ten of which is none


def test_two_operations_each_half_of_the_time(monkeypatch):
    done = []
    counted = {
        name: (lambda image, level, sign, name=name: done.append((name, level, sign)) or image) for name in OPERATIONS
    }
    monkeypatch.setattr("mhmoe_fairseq.data.images.transforms.OPERATIONS", counted)
    for seed in range(1000):
        transforms.randaugment(noise(4, 4), rng(seed))
    assert 900 < len(done) < 1100 and {level for _, level, _ in done} == {0.7}
    counts = [sum(name == operation for operation, _, _ in done) for name in OPERATIONS]
    assert min(counts) > 60 and abs(sum(sign for _, _, sign in done)) < 120


def test_resizing_is_pillows_bicubic_of_the_crop():
    image = noise(40, 30)
    box = transforms.Box(3, 5, 20, 17)
    expected = image.crop((5, 3, 22, 23)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(transforms.resize(image, 16, box)), np.asarray(expected))

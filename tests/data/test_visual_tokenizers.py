"""The interface of visual tokenizers, k-means on patches, and their files."""

import pytest
import torch

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.visual_tokenizers import PatchKMeans, load_visual_tokenizer
from mhmoe_fairseq.data.visual_tokenizers.base import check_range, from_patches, nearest, to_patches
from mhmoe_fairseq.prepare.visual_tokenizers.fitting import fit_patch_kmeans, measure
from mhmoe_fairseq.prepare.visual_tokenizers.settings import KMeansSettings


def random_images(count=6, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def fit(images, vocab_size=8, **changes):
    settings = {"patch_size": 4, "image_size": images.shape[-1], "seed": 1, "iterations": 6, **changes}
    return fit_patch_kmeans(to_patches(images, 4).flatten(0, 1), KMeansSettings(vocab_size, **settings))


def test_patches_are_row_by_row_and_go_back():
    images = random_images(2, 8)
    patches = to_patches(images, 4)
    assert patches.shape == (2, 4, 48)
    torch.testing.assert_close(patches[1, 1].view(3, 4, 4), images[1, :, :4, 4:], rtol=0, atol=0)
    torch.testing.assert_close(patches[0, 2].view(3, 4, 4), images[0, :, 4:, :4], rtol=0, atol=0)
    torch.testing.assert_close(from_patches(patches, 4, 8), images, rtol=0, atol=0)


def test_ids_are_those_of_the_nearest_mean_patch():
    images = random_images()
    tokenizer = fit(images)
    ids = tokenizer.encode(images)
    assert ids.shape == (6, 16) and ids.dtype == torch.int64 and tokenizer.token_shape == (4, 4)
    for image in range(2):
        for place in range(16):
            row, column = divmod(place, 4)
            patch = images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
            distances = [float((patch - tokenizer.mean - code).square().sum()) for code in tokenizer.centroids]
            assert ids[image, place] == min(range(8), key=distances.__getitem__)


def test_nearest_in_blocks_equals_the_whole(monkeypatch):
    vectors, codes = torch.randn(50, 6), torch.randn(9, 6)
    whole = nearest(vectors, codes)
    monkeypatch.setattr("mhmoe_fairseq.data.visual_tokenizers.base._MAX_SCORES", 40)
    assert torch.equal(nearest(vectors, codes), whole)
    assert torch.equal(whole, torch.cdist(vectors, codes).argmin(1))


def test_the_error_falls_with_every_step_until_nothing_moves():
    generator = torch.Generator().manual_seed(3)
    centres = torch.rand(8, 48, generator=generator)
    patches = (centres.repeat(40, 1) + 0.01 * torch.randn(320, 48, generator=generator)).clamp(0, 1)
    said = []
    fitted = fit_patch_kmeans(patches, KMeansSettings(8, 4, 8, seed=2, iterations=30), said.append)
    errors = [float(line.split("mean squared error ")[1].split(",")[0]) for line in said]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] and len(errors) < 30
    final = torch.cdist(patches, fitted.centroids + fitted.mean).min(1).values.square().mean() / 48
    assert float(final) == pytest.approx(errors[-1], abs=1e-5)
    assert said[-1].endswith("8 of 8 codes used")


def test_codes_that_die_are_put_elsewhere():
    black, white = torch.zeros(300, 48), torch.ones(300, 48)
    rare = torch.rand(12, 48, generator=torch.Generator().manual_seed(0))
    fitted = fit_patch_kmeans(torch.cat([black, white, rare]), KMeansSettings(10, 4, 8, seed=1, iterations=20))
    ids = nearest(torch.cat([black, white, rare]) - fitted.mean, fitted.centroids)
    assert len(ids.unique()) == 10


def test_equal_input_gives_equal_codes_and_another_seed_does_not():
    images = random_images(20)
    first, second, other = fit(images), fit(images), fit(images, seed=2)
    assert torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_too_few_different_patches_are_refused():
    with pytest.raises(UserError, match=r"8 codes \(--vocab-size, .*\): more than the 1 distinct patches"):
        fit(torch.ones(3, 3, 16, 16))


def test_decoding_shows_the_mean_patches():
    images = random_images(4)
    tokenizer = fit(images)
    ids = tokenizer.encode(images)
    decoded = tokenizer.decode(ids)
    assert torch.equal(tokenizer.encode(decoded), ids)
    expected = (tokenizer.centroids[ids[1, 6]] + tokenizer.mean).clamp(0, 1).view(3, 4, 4)
    torch.testing.assert_close(decoded[1, :, 4:8, 8:12], expected)
    figures = measure(tokenizer, images)
    assert figures["used"] == len(ids.unique()) / 8
    assert figures["mean_squared_error"] == pytest.approx(float((decoded - images).square().mean()), abs=1e-5)
    assert 1 < figures["perplexity"] <= 8


def test_a_file_keeps_everything(tmp_path):
    images = random_images()
    tokenizer = fit(images)
    tokenizer.provenance = {"seed": 1, "train": {"used": 1.0}}
    tokenizer.save(tmp_path / "tokenizer.pt")
    loaded = load_visual_tokenizer(tmp_path / "tokenizer.pt")
    assert isinstance(loaded, PatchKMeans) and loaded.provenance == tokenizer.provenance
    assert (loaded.vocab_size, loaded.patch_size, loaded.image_size) == (8, 4, 16)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.pt"]
    assert not loaded.train().training


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 16), r"images \(1, 3, 8, 16\): this tokenizer takes \(B, 3, 16, 16\)"),
        (torch.zeros(1, 1, 16, 16), "this tokenizer takes"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8: must be floating point"),
        (torch.full((1, 3, 16, 16), -1.0), r"must be in \[0, 1\], not normalised"),
        (torch.full((1, 3, 16, 16), 255.0), r"images in \[255, 255\]"),
        (torch.full((1, 3, 16, 16), float("nan")), r"must be in \[0, 1\]"),
    ],
)
def test_other_input_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        fit(random_images()).encode(images)


def test_only_values_on_the_cpu_are_looked_at():
    """Elsewhere that would make the host wait for the device; a tensor without values would raise here."""
    assert check_range(torch.zeros(1, 3, 16, 16, device="meta")) is None
    with pytest.raises(ValueError, match="not normalised"):
        check_range(torch.full((1, 3, 16, 16), 2.0))


def test_half_precision_and_autocast_change_no_id():
    images = random_images(3)
    tokenizer = fit(images)
    rounded = images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(rounded), tokenizer.encode(rounded.float()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 4, 16), "--vocab-size .1. must be at least 2"),
        ((8, 0, 16), "--patch-size .0. must be at least 1"),
        ((8, 5, 16), "--image-size 16: must be a multiple of --patch-size 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        PatchKMeans(*sizes)


class Something:
    """An object that no file of ours holds."""


def test_other_files_are_refused_and_nothing_in_them_is_run(tmp_path):
    path = tmp_path / "tokenizer.pt"
    with pytest.raises(UserError, match="no such file; `mhmoe visual-tokenizer fit` makes one"):
        load_visual_tokenizer(path)
    for content, message in (
        ({"kind": "patch_kmeans", "state": Something()}, "it holds an object of test_visual_tokenizers.Something"),
        ({"kind": "dvae"}, "'kind' is 'dvae', must be one of patch_kmeans, vqvae, vqkd"),
        ({"model": {}}, "'kind' is None"),
        ([1], "holds a list"),
        ({"kind": "patch_kmeans", "format": 2}, "format 2, this version reads 1"),
        ({"kind": "patch_kmeans", "format": 1}, "damaged visual tokenizer"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_visual_tokenizer(path)
    path.write_text("text")
    with pytest.raises(UserError, match="no readable visual tokenizer"):
        load_visual_tokenizer(path)
    fit(random_images()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=str(path)):
        load_visual_tokenizer(path)

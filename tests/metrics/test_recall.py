"""Recall against sorting by hand."""

import itertools

import pytest
import torch

from mhmoe_fairseq.metrics.recall import VectorMeter, chance_of_recall, recalls


def vectors(count, captions, seed=0, dim=6):
    """Captions are near their images; every image has one at least."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dim, generator=generator)
    owner = torch.cat([torch.arange(count), torch.randint(count, (captions - count,), generator=generator)])
    texts = images[owner] + 1.5 * torch.randn(captions, dim, generator=generator)
    return torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1), owner


def by_hand(images, texts, owner):
    found = {}
    for most in (1, 5, 10):
        hits = []
        for row, image in enumerate(images):
            best = sorted(range(len(texts)), key=lambda text: -float(image @ texts[text]))[:most]
            hits.append(any(owner[text] == row for text in best))
        found[f"text_r{most}"] = 100 * sum(hits) / len(hits)
        hits = []
        for row, text in enumerate(texts):
            best = sorted(range(len(images)), key=lambda image: -float(text @ images[image]))[:most]
            hits.append(owner[row] in best)
        found[f"image_r{most}"] = 100 * sum(hits) / len(hits)
    return {**found, "mean_recall": sum(found.values()) / 6}


@pytest.mark.parametrize("chunk", [7, 1024])
def test_recall_by_hand(monkeypatch, chunk):
    monkeypatch.setattr("mhmoe_fairseq.metrics.recall._CHUNK", chunk)
    images, texts, owner = vectors(30, 75)
    expected = by_hand(images, texts, owner)
    assert 0 < expected["image_r1"] < expected["image_r5"] < 100
    assert recalls(images, texts, owner) == pytest.approx(expected)


@pytest.mark.parametrize("texts_of_image", [[1, 1, 1], [1, 2, 1, 2], [3]])
def test_chance_is_the_mean_over_all_orders(texts_of_image):
    owners = [image for image, own in enumerate(texts_of_image) for _ in range(own)]
    found = []
    for most in (1, 5, 10):
        orders = list(itertools.permutations(owners))
        by_text = [image in order[:most] for order in orders for image in range(len(texts_of_image))]
        found += [sum(by_text) / len(by_text), min(1, most / len(texts_of_image))]
    assert chance_of_recall(texts_of_image) == pytest.approx(100 * sum(found) / len(found))


def test_one_vector_for_everything_finds_nothing():
    same = torch.ones(12, 3)
    assert recalls(same, same, torch.arange(12)) == pytest.approx(dict.fromkeys(by_hand(*vectors(3, 4)), 0.0))


def test_vectors_that_are_no_numbers_find_nothing():
    images, texts, owner = vectors(30, 75)
    nothing = dict.fromkeys(by_hand(*vectors(3, 4)), 0.0)
    assert recalls(images * torch.nan, texts * torch.nan, owner) == nothing
    texts[0] = torch.nan  # one of them alone, found by none; the image's other texts are
    images[owner[0]] = torch.nan
    assert 0 < recalls(images, texts, owner)["text_r10"] < 100


def batch(rows, images, texts, owner):
    return rows, owner[rows] + 100, images[owner[rows]], texts[rows]


def test_a_meter_counts_each_row_once_whatever_the_batches():
    """A rank that has run out of batches repeats its first one."""
    images, texts, owner = vectors(20, 45)
    meter = VectorMeter()
    for rows in torch.randperm(45, generator=torch.Generator().manual_seed(1)).split(8):
        meter.update(batch(rows, images, texts, owner))
    meter.update(batch(torch.arange(8), images, texts, owner))
    assert meter.recalls == pytest.approx(by_hand(images, texts, owner))
    meter.reset()
    meter.update(batch(torch.arange(20), images, texts, owner))
    assert meter.recalls == pytest.approx(by_hand(images, texts[:20], owner[:20]))

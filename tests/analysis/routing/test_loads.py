"""What parts share of their experts, and how routing tells languages apart, by hand."""

import numpy as np
import pytest
from written_runs import loads as expert_loads

from mhmoe_fairseq.analysis.routing.loads import PartLoads, accuracy, part_guesses
from mhmoe_fairseq.evaluation.records import ExpertLoads, LayerLoads


def test_what_two_languages_share() -> None:
    loads = PartLoads(["a", "b", "c"], [1], np.array([[[4.0, 4, 0, 0]], [[0, 10, 10, 0]], [[0, 0, 0, 1]]]))
    assert loads.overlap_LGG().tolist() == [[[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    assert loads.mean_overlap() == [pytest.approx(0.5 / 3)]
    assert PartLoads(["a"], [1], np.ones((1, 1, 4))).mean_overlap() == [1.0]


def test_languages_are_told_apart_by_the_experts_they_use() -> None:
    apart = [np.array([[[9.0, 1, 0]]] * 6), np.array([[[0.0, 1, 9]]] * 4)]
    guesses = part_guesses(apart)
    assert guesses.tolist() == [[[3, 0], [0, 2]]] * 2  # one layer, and all of them together
    assert accuracy(guesses[0]) == 1.0
    alike = [np.array([[[5.0, 5, 5]]] * 8)] * 4
    assert accuracy(part_guesses(alike)[0]) == 0.25  # chance: all are taken for the first


def test_layers_together_tell_what_one_alone_does_not() -> None:
    def pieces(first: list[float], second: list[float]) -> np.ndarray:
        return np.array([[first, second]] * 6)

    one, other = [8.0, 2.0], [2.0, 8.0]
    loads = [pieces(one, one), pieces(one, other), pieces(other, one), pieces(other, other)]
    first, second, together = map(accuracy, part_guesses(loads))
    assert (first, second, together) == (0.5, 0.5, 1.0)


def test_experts_of_each_modality_follow_one_another() -> None:
    rows = [(1, None, [8.0, 2.0]), (1, "image", [8.0, 0.0]), (1, "text", [2.0, 6.0])]
    assert PartLoads.of(expert_loads(*rows)).overlap_LGG().tolist() == [[[1.0, 0.25], [0.25, 1.0]]]
    pools = [LayerLoads(3, [8.0, 1.0], "image", "image"), LayerLoads(3, [2.0, 6.0], "text", "text")]
    loads = PartLoads.of(ExpertLoads(pools))
    assert loads.load_GLE.tolist() == [[[8.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 2.0, 6.0]]]
    assert (loads.parts, loads.layers, loads.mean_overlap()) == (["image", "text"], [3], [0.0])

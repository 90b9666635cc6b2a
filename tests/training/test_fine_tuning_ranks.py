"""Two ranks do what one process does: pre-training with shared experts, layers' learning rates, losses over rows."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from beit3_models import beit3_batch, beit3_dictionary, small_beit3
from decayed_models import FACTORS, build, inputs, step
from images_and_words import training_words, write_images_and_words
from parallel_runs import figures, updates_in
from workers import Workers

from mhmoe_fairseq.criterions.base import GateLossConfig
from mhmoe_fairseq.criterions.finetuning import RetrievalCriterion
from mhmoe_fairseq.models.heads import CenteredLayerNorm, RetrievalHead
from mhmoe_fairseq.moe.layer import taken_for_padding
from mhmoe_fairseq.parallel import expert_parallelism, gather_rows

LENGTHS = [9, 5, 2, 7, 4]
ROWS = {0: slice(0, 3), 1: slice(3, 5)}  # of each rank: unequal numbers


def updates(parallel=None):
    """Norms, parameters and the optimizer's state after three updates; every rank has the same batches."""
    model, optimizer = build(parallel=parallel)
    norms = [step(model, optimizer, inputs(seed)) for seed in range(3)]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = None
    if parallel is not None:
        optimizer.optimizer.consolidate_state_dict()
    if parallel is None or dist.get_rank() == 0:
        state = copy.deepcopy(optimizer.state_dict())
    return norms, weights, state


def contrast(rows=slice(None), counted=True):
    """Loss, gradients and, in evaluation, vectors of some rows of a batch."""
    model = small_beit3("dense_beit3_tiny", num_visual_tokens=0).double()
    torch.manual_seed(1)
    model.register_head("retrieval", RetrievalHead(32).double())
    task = SimpleNamespace(head_name="retrieval", target_dictionary=beit3_dictionary())
    criterion = RetrievalCriterion(task, GateLossConfig())
    numbers = torch.arange(len(LENGTHS))[rows]
    batch = {
        "id": numbers,
        "image_ids": 50 + numbers,
        "net_input": {key: value[rows] for key, value in beit3_batch("pair", LENGTHS).items()},
        "ntokens": len(numbers),
        "counted": counted,
    }
    loss = criterion(model, batch)[0]
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    vectors = criterion.vectors(criterion.embed(model.eval(), batch), batch)
    return loss.item(), gradients, vectors


def centered_means(rows=slice(None)):
    """The running mean after each of three batches, of some rows of each."""
    norm = CenteredLayerNorm(4)
    means = []
    for seed in range(3):
        norm(torch.randn(len(LENGTHS), 4, generator=torch.Generator().manual_seed(seed))[rows])
        means.append(norm.running_mean.clone())
    return torch.stack(means)


def with_a_filler():
    """Loss, gradients and vectors of a batch that only rank 0 has, and the mean that its rows leave on both ranks."""
    is_filler = dist.get_rank() > 0
    norm = CenteredLayerNorm(4)
    with taken_for_padding(norm, is_filler):
        norm(torch.full((3, 4), 7.0 if is_filler else 2.0))
    return contrast(counted=not is_filler), norm.running_mean


def everything():
    """On each rank, in one call, because a process spends far more time on its imports."""
    rows = ROWS[dist.get_rank()]
    return updates(expert_parallelism(2)), contrast(rows), centered_means(rows), with_a_filler()


@pytest.fixture(scope="module")
def outcomes(workers2):
    return workers2.run(everything)


def test_layers_learn_as_in_one_process_with_experts_on_two_ranks(outcomes):
    norms, weights, state = updates()
    of_ranks = [outcome[0] for outcome in outcomes]
    for own_norms, _, _ in of_ranks:
        assert own_norms == pytest.approx(norms, rel=1e-4)
    for name, value in weights.items():
        parts = [own[name] for _, own, _ in of_ranks]
        whole = torch.cat(parts) if ".experts." in name else parts[0]
        torch.testing.assert_close(whole, value, atol=1e-5, rtol=1e-4, msg=name)
    saved = of_ranks[0][2]
    assert [group["lr_scale"] for group in saved["param_groups"]] == list(FACTORS.values())
    model, optimizer = build()
    model.load_state_dict({name: torch.cat(p) if ".experts." in name else p[0] for name, p in _parts(of_ranks).items()})
    optimizer.load_state_dict(saved)  # all experts, and what two ranks saved goes on in one process
    other, its = build()
    other.load_state_dict(weights)
    its.load_state_dict(state)
    assert step(model, optimizer, inputs(9)) == pytest.approx(step(other, its, inputs(9)), rel=1e-4)


def _parts(of_ranks):
    return {name: [own[name] for _, own, _ in of_ranks] for name in of_ranks[0][1]}


def test_the_contrastive_loss_of_two_ranks_is_that_of_all_rows(outcomes):
    loss, gradients, vectors = contrast()
    of_ranks = [outcome[1] for outcome in outcomes]
    assert sum(own for own, _, _ in of_ranks) == pytest.approx(loss, rel=1e-6)
    assert gradients["heads.retrieval.logit_scale"].abs() > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(own[name] for _, own, _ in of_ranks), gradient, atol=1e-6, rtol=1e-4, msg=name)
    for _, _, own in of_ranks:
        assert own[0].tolist() == [0, 1, 2, 3, 4] and own[1].tolist() == [50, 51, 52, 53, 54]
        torch.testing.assert_close(own[3], vectors[3])


def test_two_ranks_take_away_the_mean_of_all_rows(outcomes):
    for outcome in outcomes:
        torch.testing.assert_close(outcome[2], centered_means())


def test_a_filler_is_compared_with_no_row_and_enters_no_mean(outcomes):
    loss, gradients, vectors = contrast()
    (own, own_gradients, own_vectors), mean = outcomes[0][3]
    (nothing, no_gradients, its_vectors), its_mean = outcomes[1][3]
    assert own == pytest.approx(loss, rel=1e-6) and nothing == 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        assert not no_gradients[name].any()
    assert own_vectors[0].tolist() == its_vectors[0].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(own_vectors[3], vectors[3])
    assert mean.tolist() == its_mean.tolist() == [2.0] * 4


def test_one_process_has_its_own_rows():
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) == (rows, 0)


FIGURES = ("loss", "image_loss", "text_loss", "pair_image_loss", "pair_text_loss", "gate_loss", "gnorm", "moe_entropy")
COUNTS = {"train": {"image": 9, "text": 32, "pair": 20}, "valid": {"image": 3, "text": 12, "pair": 5}}
ODD = {"train": {"image": 2, "text": 11, "pair": 5}, "valid": {"image": 1, "text": 9, "pair": 3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data", COUNTS)


def train(ranks: int, data: Path, save_dir: Path, *flags: object, updates: int) -> list[str]:
    words = training_words(data, save_dir, "--update-freq", 2 // ranks, *flags, updates=updates)
    return Workers(ranks).fairseq("fairseq-train", *words, timeout=300)


def parameters(save_dir: Path) -> dict[str, torch.Tensor]:
    state = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)["model"]
    # Keys' biases have a gradient of zero but for rounding, which Adam makes large.
    return {name: value for name, value in state.items() if "k_proj" not in name or not name.endswith("bias")}


def valid_records(log: str) -> list[dict[str, str]]:
    return [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"valid_ppl"' in line]


def test_two_ranks_train_as_one_process(data: Path, tmp_path: Path) -> None:
    """An epoch is 8 batches, so that no rank runs out before the other."""
    one, *_ = train(1, data, tmp_path / "one", updates=6)
    two, *_ = train(2, data, tmp_path / "two", updates=6)
    assert len(updates_in(one)) == 6 and '"a2a_rows"' in two
    assert figures(updates_in(two), *FIGURES) == figures(updates_in(one), *FIGURES)
    names = [f"valid_{name}" for name in FIGURES if name != "gnorm"]
    for record, other in zip(valid_records(two), valid_records(one), strict=True):
        assert {name: record[name] for name in names} == {name: other[name] for name in names}
    expected, found = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-5), name


def test_a_rank_without_a_batch_holds_nobody_up(tmp_path: Path) -> None:
    """Three batches in training, three in validation, of which two have no image of their own."""
    data = write_images_and_words(tmp_path / "data", ODD)
    (log, _) = train(2, data, tmp_path / "run", "--update-freq", 1, "--max-epoch", 2, updates=20)
    assert [update["num_updates"] for update in updates_in(log)] == ["1", "2", "3", "4"]
    (alone,) = train(1, data, tmp_path / "alone", "--update-freq", 2, "--max-epoch", 2, updates=20)
    assert [record["valid_ppl"] for record in valid_records(log)] == [
        record["valid_ppl"] for record in valid_records(alone)
    ]

"""``--store-ema``: trained, saved, resumed and evaluated, with the integers of a model's state."""

from types import SimpleNamespace

import pytest
import torch
from console import evaluate
from fairseq import checkpoint_utils
from fairseq.models.ema import EMA
from parallel_runs import saved, train_logs, updates_in, write_even_corpus

from mhmoe_fairseq.models.heads import CenteredLayerNorm

SETTINGS = SimpleNamespace(ema_decay=0.75, ema_seed_model=None, ema_fp32=False, ema_start_update=0, ema_update_freq=1)
FLAGS = ("--store-ema", "--ema-decay", 0.5)


def test_integers_are_copied_and_the_rest_averaged():
    norm = CenteredLayerNorm(2)
    average = EMA(norm, SETTINGS)
    norm(torch.full((3, 2), 4.0))
    average.step(norm, 1)
    state = average.get_model().state_dict()
    assert state["num_batches"] == 1 and state["running_mean"].tolist() == [1.0, 1.0]


def test_tied_weights_are_averaged_once():
    one, other = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    other.weight = one.weight
    model = torch.nn.Sequential(one, other)
    torch.nn.init.zeros_(one.weight)
    average = EMA(model, SETTINGS)
    torch.nn.init.ones_(one.weight)
    average.step(model, 1)
    for value in average.get_model().state_dict().values():
        assert value.flatten().tolist() == [0.25] * 4


def test_stock_averages_fail_at_integers():
    average = EMA.__new__(EMA)
    EMA.__init__.__wrapped__(average, CenteredLayerNorm(2), SETTINGS)
    with pytest.raises(RuntimeError, match="can't be cast to"):
        average.step(CenteredLayerNorm(2), 1)


def test_a_training_with_averages_resumes_and_its_averages_are_evaluated(tmp_path):
    """Saved by two ranks that each hold all experts, resumed by one."""
    data = write_even_corpus(tmp_path, batches=8)
    train_logs(2, data, tmp_path / "run", *FLAGS, "--mhmoe-expert-parallel-size", 1, updates=1)
    before = saved(tmp_path / "run")["extra_state"]["ema"]
    (log,) = train_logs(1, data, tmp_path / "run", *FLAGS, updates=2)
    assert [update["num_updates"] for update in updates_in(log)] == ["2"]
    after = saved(tmp_path / "run")
    assert after["extra_state"]["ema"].keys() == after["model"].keys()
    for name, value in after["extra_state"]["ema"].items():
        own = after["model"][name]
        expected = (before[name] + own) / 2 if own.is_floating_point() else own
        torch.testing.assert_close(value, expected, msg=name)
    checkpoint_utils.save_ema_as_checkpoint(str(tmp_path / "run/checkpoint_last.pt"), str(tmp_path / "ema.pt"))
    assert "Perplexity" in evaluate(data, tmp_path / "ema.pt", "--tokens-per-sample", 16)

"""What stock fairseq would get wrong under expert parallelism is refused before any work."""

import pytest
from parallel_runs import MODEL, OPTIMIZATION, configuration, write_even_corpus
from workers import TRAIN_FLAGS, WorkerError

from mhmoe_fairseq.training.checks import problems

REFUSED = {
    "--optimizer adam": "--optimizer (adam) must be mhmoe_adam",
    "--ddp-backend pytorch_ddp": "--ddp-backend (pytorch_ddp) must be legacy_ddp",
    "--zero-sharding os": "--zero-sharding (os) must be none",
    "--model-parallel-size 2": "--model-parallel-size (2) must be 1",
    "--fp16-adam-stats": "--fp16-adam-stats must be off",
    "--use-bmuf": "--use-bmuf must be off",
    "--store-ema": "--store-ema must be off",
    "--no-save-optimizer-state": "--no-save-optimizer-state must be off",
    "--fp16": "--fp16 needs --fp16-no-flatten-grads or --memory-efficient-fp16",
}
ALLOWED = (
    "--ddp-backend no_c10d --fp16 --fp16-no-flatten-grads --load-checkpoint-on-all-dp-ranks",
    "--memory-efficient-fp16",
    "--amp",
)


def test_every_unsafe_flag_is_seen():
    flags = configuration(*" ".join(REFUSED).split()).task
    found = list(problems(flags))
    assert len(found) == len(REFUSED)
    for problem, (flag, expected) in zip(found, REFUSED.items()):
        assert problem.startswith(expected), flag


@pytest.mark.parametrize("flags", ALLOWED)
def test_safe_flags_are_allowed(flags):
    assert list(problems(configuration(*flags.split()).task)) == []


def test_a_training_is_refused_at_its_start(workers2, tmp_path):
    data = write_even_corpus(tmp_path)
    words = [data, *TRAIN_FLAGS, *MODEL, *OPTIMIZATION, "--optimizer", "adam", "--save-dir", tmp_path / "saved"]
    with pytest.raises(
        WorkerError, match=r"UserError: --optimizer \(adam\) must be mhmoe_adam.* spread over 2 ranks"
    ) as caught:
        workers2.fairseq("fairseq-train", *words)
    assert "loaded" not in str(caught.value)  # not even the data


def test_one_bank_for_each_rank_needs_nothing_special(workers2, tmp_path):
    data = write_even_corpus(tmp_path)
    flags = ["--mhmoe-expert-parallel-size", 1, "--max-update", 1, "--save-dir", tmp_path / "saved"]
    logs = workers2.fairseq("fairseq-train", data, *TRAIN_FLAGS, *MODEL, *OPTIMIZATION, "--optimizer", "adam", *flags)
    assert '"num_updates": "1"' in logs[0]

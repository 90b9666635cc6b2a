"""Expert parallelism through ``fairseq-train``: the same training and the same checkpoints as in one process."""

import functools

import pytest
import torch
from console import evaluate
from parallel_runs import figures, saved, train, write_even_corpus

from mhmoe_fairseq.common.locks import LOCK

UPDATES = 50
SAVED_AT = 30
FIGURES = ("loss", "gate_loss", "gnorm", "z_loss", "ppl", "moe_active", "moe_load_max", "moe_overflow", "moe_entropy")
SAVING = ("--save-interval-updates", SAVED_AT)
CHECKPOINT = "checkpoint_2_30.pt"  # in the second epoch: 24 updates make one
SCALE = ("--fp16-init-scale", "8")  # on a CPU fairseq cannot skip an update that overflows
BIAS = "decoder.layers.1.moe_layer.gate.balancing.bias"
EXPERTS = "decoder.layers.1.moe_layer.experts.fc1_weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_even_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """By the number of ranks, which is the expert-parallel size: what 50 updates logged, and the checkpoint folder."""

    @functools.lru_cache(maxsize=None)
    def run(ranks: int):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        return train(ranks, data, folder, *SAVING, updates=UPDATES), folder

    return run


def resume(data, folder, ranks, checkpoint, *flags):
    return train(ranks, data, folder, "--restore-file", checkpoint, *flags, updates=UPDATES)


def parameters(state):
    """What training decides: the gradient of ``k_proj.bias`` is zero but for rounding, and Adam blows that up."""
    return {name: value for name, value in state["model"].items() if not name.endswith("k_proj.bias")}


# ---------------------------------------------------------------------- the same training


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_on_several_ranks_train_as_in_one_process(trained, ranks):
    one, several = trained(1)[0], trained(ranks)[0]
    assert len(one) == UPDATES and float(one[-1]["loss"]) < 3 < float(one[0]["loss"])
    assert figures(several, *FIGURES) == figures(one, *FIGURES)
    assert {update["a2a_rows"] for update in several} == {"512"}  # 128 tokens x 2 heads x top 2


def test_two_banks_of_experts_train_as_one(trained, data, tmp_path):
    several = train(4, data, tmp_path, "--mhmoe-expert-parallel-size", 2, updates=UPDATES)
    assert figures(several, *FIGURES) == figures(trained(1)[0], *FIGURES)


def test_heads_on_two_ranks_train_and_resume_as_in_one_process(data, tmp_path):
    """With a selection bias, which every rank moves for all heads and uses for its own."""
    flags = ("--mhmoe-expert-banks", "per-head", "--mhmoe-balancing", "quantile", "--mhmoe-balancing-rate", 0.3)
    saving = ("--save-interval-updates", 10)
    loads = [tmp_path / f"{ranks}.jsonl" for ranks in (1, 2)]
    one = train(1, data, tmp_path / "one", *flags, "--mhmoe-load-log", loads[0], updates=20)
    heads = (*flags, "--mhmoe-parallel", "heads")
    two = train(2, data, tmp_path / "two", *heads, *saving, "--mhmoe-load-log", loads[1], updates=20)
    assert figures(two, *FIGURES) == figures(one, *FIGURES)
    assert {update["a2a_rows"] for update in two} == {"256"}  # 128 tokens, half of each to either rank
    assert loads[0].read_bytes() == loads[1].read_bytes()
    bias, same = (saved(tmp_path / run)["model"][BIAS] for run in ("one", "two"))
    assert torch.equal(bias, same) and bias.shape == (2, 8) and (bias.std(1) > 0.001).all()
    checkpoint = tmp_path / "two" / "checkpoint_1_10.pt"
    experts = train(2, data, tmp_path / "again", *flags, "--restore-file", checkpoint, updates=20)
    for name in ("loss", "gate_loss", "gnorm", "moe_load_max"):  # sums of other parts, rounded otherwise
        values, expected = ([float(update[name]) for update in updates] for updates in (experts, one[10:]))
        assert values == pytest.approx(expected, rel=1e-3), name
    assert {update["a2a_rows"] for update in experts} == {"512"}  # 128 tokens x 2 heads x top 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks, size", [(2, 2), (4, 2), (4, 4)])
def test_limited_capacity_trains_as_in_one_process(data, tmp_path, ranks, size):
    flags = ("--mhmoe-routing", "capacity", "--mhmoe-capacity-factor", "0.75")
    one = train(1, data, tmp_path / "one", *flags, updates=UPDATES)
    several = train(ranks, data, tmp_path / "several", *flags, "--mhmoe-expert-parallel-size", size, updates=UPDATES)
    assert float(one[-1]["moe_overflow"]) > 0.05
    assert figures(several, *FIGURES) == figures(one, *FIGURES)


def test_global_balance_is_that_of_one_larger_batch(tmp_path):
    """An epoch of one update, so that the ranks' batches are the halves of the larger one."""
    data = write_even_corpus(tmp_path, batches=4)
    one = train(1, data, tmp_path / "one", "--batch-size", 8, "--update-freq", 1, updates=10)
    halves = ("--batch-size", 4, "--update-freq", 1)
    two = train(2, data, tmp_path / "two", *halves, "--mhmoe-balance-scope", "global", updates=10)
    apart = train(2, data, tmp_path / "apart", *halves, updates=10)
    assert len(one) == 10 and figures(two, *FIGURES) == figures(one, *FIGURES)
    assert figures(apart, "gate_loss") != figures(one, "gate_loss")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--memory-efficient-fp16", *SCALE), id="fp16-memory-efficient"),
        pytest.param(("--fp16", "--fp16-no-flatten-grads", *SCALE), id="fp16-no-flatten", marks=pytest.mark.slow),
        pytest.param(("--amp", "--mhmoe-precision", "fp16"), id="amp", marks=pytest.mark.slow),
        pytest.param(("--mhmoe-precision", "bf16"), id="bf16", marks=pytest.mark.slow),
    ],
)
def test_sixteen_bits_train_and_resume_alike(trained, data, tmp_path, flags):
    """Sums over ranks round in another order than sums over micro-batches: equal to within rounding."""
    two = train(2, data, tmp_path / "two", *flags, "--save-interval-updates", 10, updates=20)
    four = train(4, data, tmp_path / "four", *flags, "--restore-file", tmp_path / "two/checkpoint_1_10.pt", updates=20)
    for updates, reference in ((two, trained(1)[0]), (four, trained(1)[0][10:])):
        for name in ("loss", "gate_loss", "gnorm"):
            values = [float(update[name]) for update in updates]
            expected = [float(update[name]) for update in reference[: len(updates)]]
            assert values == pytest.approx(expected, rel=0.02), name
    if "--fp16-no-flatten-grads" not in flags:  # there fairseq drops the fp32 weights' low bits when it resumes
        again = train(
            2, data, tmp_path / "2", *flags, "--restore-file", tmp_path / "two/checkpoint_1_10.pt", updates=20
        )
        assert figures(again, *FIGURES) == figures(two[10:], *FIGURES)


# ---------------------------------------------------------------------- the same checkpoints


def matrix():
    """Saved and resumed on 1, 2, 4 ranks; one way through all of them is in the default suite."""
    default = {(1, 2), (2, 4), (4, 1)}
    for before in (1, 2, 4):
        for after in (1, 2, 4):
            marks = () if (before, after) in default else pytest.mark.slow
            yield pytest.param(before, after, marks=marks)


@pytest.mark.parametrize("before, after", list(matrix()))
def test_training_continues_on_other_ranks(trained, data, tmp_path, before, after):
    resumed = resume(data, tmp_path, after, trained(before)[1] / CHECKPOINT)
    assert figures(resumed, *FIGURES) == figures(trained(1)[0][SAVED_AT:], *FIGURES)
    assert len(resumed) == UPDATES - SAVED_AT
    assert evaluated(data, tmp_path / "checkpoint_last.pt") == evaluated(data, trained(1)[1] / "checkpoint_last.pt")


@functools.lru_cache(maxsize=None)
def evaluated(data, checkpoint) -> str:
    log = evaluate(data, checkpoint, "--tokens-per-sample", 16)
    return log[log.index("Loss (base 2)") :]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_checkpoint_does_not_tell_how_many_ranks_wrote_it(trained, data, ranks):
    one, several = (saved(trained(r)[1], CHECKPOINT) for r in (1, ranks))
    assert {n: v.shape for n, v in several["model"].items()} == {n: v.shape for n, v in one["model"].items()}
    assert one["model"][EXPERTS].shape[0] == 8
    for name, value in parameters(several).items():
        torch.testing.assert_close(value, parameters(one)[name], rtol=0, atol=2e-5, msg=name)
    assert several["last_optimizer_state"]["state"].keys() == one["last_optimizer_state"]["state"].keys()
    for index, expected in one["last_optimizer_state"]["state"].items():
        state = several["last_optimizer_state"]["state"][index]
        assert state["step"] == expected["step"] == SAVED_AT
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], expected[key], rtol=1e-3, atol=1e-6, msg=f"{index} {key}")
    assert evaluated(data, trained(ranks)[1] / CHECKPOINT) == evaluated(data, trained(1)[1] / CHECKPOINT)


def test_adam_goes_on_with_a_run_of_mhmoe_adam(trained, data, tmp_path):
    updates, folder = trained(1)
    resumed = resume(data, tmp_path, 1, folder / CHECKPOINT, "--optimizer", "adam")
    assert figures(resumed, *FIGURES) == figures(updates[SAVED_AT:], *FIGURES)
    adam, ours = saved(tmp_path), saved(folder)
    assert adam["optimizer_history"][-1]["optimizer_name"] == ours["optimizer_history"][-1]["optimizer_name"]
    for name, value in parameters(ours).items():
        torch.testing.assert_close(parameters(adam)[name], value, rtol=0, atol=2e-5, msg=name)
    for index, state in ours["last_optimizer_state"]["state"].items():
        other = adam["last_optimizer_state"]["state"][index]
        assert list(other) == list(state) and other["step"] == state["step"]
        assert all(type(other[key]) is type(value) for key, value in state.items())


def test_no_file_is_left_half_written(trained):
    names = {path.name for path in trained(2)[1].iterdir()}
    assert names == {CHECKPOINT, "checkpoint_best.pt", "checkpoint_last.pt", LOCK}

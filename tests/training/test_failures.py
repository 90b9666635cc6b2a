"""What happens to one rank happens to all, soon, and with the reason."""

import json
import logging
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from beit3_models import beit3_batch, small_beit3
from console import SERVER
from killable import Ranks
from language_models import small_model, token_rows
from workers import TRAIN_FLAGS

from mhmoe_fairseq.training import failures
from mhmoe_fairseq.training.checks import require_process_group
from mhmoe_fairseq.training.failures import Board, Watch, guard_ranks, no_lone_recovery
from mhmoe_fairseq.training.nonfinite import latest_routing, report_nonfinite

MODEL = (
    "--arch", "mhmoe_lm_tiny", "--decoder-layers", 2, "--moe-expert-count", 4, "--tokens-per-sample", 32,
    "--batch-size", 4, "--optimizer", "mhmoe_adam",
)  # fmt: skip


def training(data: Path, folder: Path, *flags: object, **how: object) -> Ranks:
    words = (data, *TRAIN_FLAGS, *MODEL, "--lr", 0.001, "--save-dir", folder / "saved", *flags)
    return Ranks(folder / "ranks", 2, *words, **how)


def fail_at_the_third_batch(rank: int) -> None:
    if rank != 1:
        return
    from mhmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyCriterion

    stock, calls = MoECrossEntropyCriterion.forward, iter(range(100))

    def forward(*args: object, **kwargs: object) -> object:
        if next(calls) == 2:
            raise ValueError("sample 17 is bad")
        return stock(*args, **kwargs)

    MoECrossEntropyCriterion.forward = forward


def test_a_rank_that_raises_ends_the_other_with_its_reason(corpus: Path, tmp_path: Path) -> None:
    """fairseq answers a ValueError in a step by saving ``crash.pt``, on that rank alone: nobody may wait in it."""
    ranks = training(corpus, tmp_path, "--max-update", 100, beforehand=fail_at_the_third_batch)
    assert ranks.end(60) == [1, 1]
    assert "ValueError: sample 17 is bad" in ranks.output(1)
    last_line = ranks.output(0).splitlines()[-1]
    assert "rank 0 lost the connection to another rank: rank 1 (" in last_line
    assert last_line.endswith("failed: ValueError: sample 17 is bad")


def test_a_gradient_that_is_not_finite_is_reported_by_all_ranks(corpus: Path, tmp_path: Path) -> None:
    ranks = training(corpus, tmp_path, "--max-update", 100, "--lr", 1e38)
    assert ranks.end(60) == [1, 1]
    for rank in (0, 1):
        report = ranks.output(rank).split(f"rank {rank}, the update whose gradient is not finite: loss nan;")[1]
        layers = {line.split(":")[0]: line for line in report.splitlines()}
        assert "gnorm nan" in layers["  decoder.layers.0"]
        assert "expert loads" in layers["  decoder.layers.1"] and "router entropy" in layers["  decoder.layers.1"]
        assert "FloatingPointError: gradients are Nan/Inf" in ranks.output(rank)
    crash = torch.load(tmp_path / "saved" / "crash.pt", weights_only=True)["model"]
    assert crash["decoder.layers.1.moe_layer.experts.fc1_weight"].size(0) == 4  # of both ranks


@pytest.mark.slow
def test_a_frozen_rank_ends_the_other(corpus: Path, tmp_path: Path) -> None:
    ranks = training(corpus, tmp_path, "--max-update", 100_000, watch=10)
    ranks.until(lambda: ranks.updates() >= 3)
    ranks.kill(1, signal.SIGSTOP)
    began = time.monotonic()
    assert ranks.end(60, but=1) == [1, None]
    assert time.monotonic() - began < 40
    assert "the training ends, because rank 1 (" in ranks.output(0)
    assert "has given no sign of life for 10 s" in ranks.output(0)


@pytest.mark.parametrize("update_freq, updates", [(1, 5), (2, 3)])
def test_ranks_with_fewer_batches_hold_nobody_up(
    workers2, corpus: Path, tmp_path: Path, update_freq: int, updates: int
) -> None:
    """9 training batches and 1 for validation: rank 1 fills up with dummy batches, which take part in the exchange."""
    flags = ("--tokens-per-sample", 56, "--batch-size", 16, "--max-epoch", 2, "--update-freq", update_freq)
    found = []
    for size in (2, 1):
        places = ("--save-dir", tmp_path / f"saved-{size}", "--mhmoe-expert-parallel-size", size)
        words = (corpus, *TRAIN_FLAGS, *MODEL, "--lr", 0.001, *flags, *places)
        output = workers2.fairseq("fairseq-train", *words, timeout=300)[0]
        found.append([(valid["valid_num_updates"], valid["valid_loss"]) for valid in records(output, "valid")])
    assert [number for number, _ in found[0]] == [str(updates), str(2 * updates)]
    assert found[0] == found[1]


def records(output: str, part: str) -> list[dict[str, str]]:
    """What fairseq logged about a part, ``--log-format json``."""
    return [json.loads(line) for line in re.findall(rf"\b{part}\b\W*(\{{.*\}})$", output, re.MULTILINE)]


def wait_for_a_sleeper() -> float:
    import os

    group = dist.new_group()
    os.environ.update(MHMOE_TRANSFER_SECONDS="1", MHMOE_WATCH_SECONDS="0")
    guard_ranks([group])
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60), dist.group.WORLD)  # for the end of the test
    began = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            dist.all_reduce(torch.ones(1), group=group)
    took = time.monotonic() - began
    dist.barrier()
    return took


def test_a_transfer_has_a_time_limit(workers2) -> None:
    assert 0.5 < workers2.run(wait_for_a_sleeper)[0] < 20


@pytest.mark.parametrize("variable", ["MHMOE_TRANSFER_SECONDS", "MHMOE_WATCH_SECONDS"])
@pytest.mark.parametrize("value", ["-1", "two", ""])
def test_limits_are_seconds(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{variable} \({value}\) must be a number of seconds"):
        guard_ranks([])


def boards() -> tuple[Board, Board]:
    store = dist.HashStore()
    return Board(store, 0, 2, limit=60), Board(store, 1, 2, limit=60)


class Clock:
    """Stands for ``time`` in the watch."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failures, "time", clock)
    return clock


def test_a_rank_without_signs_of_life_is_lost_and_all_are_told(clock: Clock) -> None:
    first, second = boards()
    watch = Watch(first, 60, lambda: False)
    for clock.now in range(0, 100, 3):
        second.sign()
        assert watch.lost() == ""
    for clock.now in range(100, 160, 3):
        assert watch.lost() == ""
    clock.now = 162
    assert "rank 1 (" in watch.lost() and "no sign of life for 60 s" in second.failure()


def test_ranks_that_were_stopped_together_go_on(clock: Clock) -> None:
    first, second = boards()
    watch = Watch(first, 60, lambda: False)
    assert watch.lost() == ""
    clock.now = 1000  # as after Ctrl-Z: nobody has looked or signed
    assert watch.lost() == ""
    for clock.now in range(1003, 1060, 3):
        assert watch.lost() == ""
    clock.now = 1063
    assert "rank 1 (" in watch.lost()


def test_the_first_reason_stays() -> None:
    first, second = boards()
    assert first.failure() == ""
    second.fail("no memory")
    first.fail("connection lost")
    assert (first.failure(), second.failure()) == ("no memory", "no memory")


def serve_a_store(told: Path) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told.with_suffix(".tmp").write_text(str(store.port))
    told.with_suffix(".tmp").rename(told)
    time.sleep(100)


def test_a_store_whose_process_is_frozen_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in rank 0 without torchrun: calls into it wait for good, and so would whoever explains an error."""
    server = SERVER.Process(target=serve_a_store, args=(tmp_path / "port",))
    server.start()
    try:
        while not (tmp_path / "port").exists():
            time.sleep(0.05)
        store = dist.TCPStore("localhost", int((tmp_path / "port").read_text()), is_master=False)
        board, reasons = Board(store, 1, 2, limit=2), []
        watch = Watch(board, 2, lambda: False)
        monkeypatch.setattr(watch, "_end", reasons.append)
        os.kill(server.pid, signal.SIGSTOP)
        watch.start()
        watch.join(20)
        assert len(reasons) == 1 and reasons[0].endswith("cannot be reached any more")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="the key-value store has not answered for 2 s"):
            watch.explain(RuntimeError("Connection closed by peer"))
        assert time.monotonic() - began < 2
    finally:
        server.kill()
        server.join()


def test_the_watch_ends_when_the_ranks_part() -> None:
    first, second = boards()
    parted: list[bool] = []
    watch = Watch(first, 1.0, lambda: bool(parted))
    watch.start()
    parted.append(True)
    second.fail("nobody must hear this")
    watch.join(10)
    assert not watch.is_alive()


def test_only_where_experts_are_spread_a_full_gpu_ends_the_training() -> None:
    full = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError) as caught, no_lone_recovery(False):
        raise full
    assert caught.value is full


def meet_a_full_gpu() -> str:
    with pytest.raises(RuntimeError) as caught, no_lone_recovery(True):
        raise RuntimeError("CUDA out of memory")
    return str(caught.value)


def test_with_spread_experts_fairseq_does_not_recognise_a_full_gpu(workers2) -> None:
    for rank, message in enumerate(workers2.run(meet_a_full_gpu)):
        assert f"rank {rank} has too little GPU memory" in message and "--batch-size" in message
        assert "out of memory" not in message


def test_the_report_names_layers_loads_and_norms(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(moe_expert_count=4)
    rows = token_rows([5, 3])
    routing = latest_routing(model)
    model(rows)[0].sum().backward()
    with torch.no_grad():
        model.decoder.layers[1].moe_layer.router.reduction.weight[0, 0] = float("inf")
    model(rows)
    with caplog.at_level(logging.ERROR):
        report_nonfinite(model, torch.tensor(float("inf")), "validation", routing)
    lines = caplog.messages[0].splitlines()
    assert lines[0] == "validation: loss inf; layer by layer on this rank:"
    loads = routing[model.decoder.layers[1]].expert_load.tolist()
    moe = next(line for line in lines if line.startswith("  decoder.layers.1:"))
    assert "weights inf" in moe and moe.endswith(f"expert loads {' '.join(f'{load:.0f}' for load in loads)}")
    dense = next(line for line in lines if line.startswith("  decoder.layers.0:"))
    assert "inf" not in dense and "expert loads" not in dense
    parameters = list(model.decoder.layers[0].parameters())
    for name, tensors in (("weights", parameters), ("gnorm", [parameter.grad for parameter in parameters])):
        norm = sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5
        assert f"{name} {norm:g}" in dense
    assert any(line.startswith("  decoder.embed_tokens:") for line in lines)


def test_the_report_has_the_loads_of_both_modalities_experts(caplog: pytest.LogCaptureFixture) -> None:
    model = small_beit3(mhmoe_modality_experts="separate").double()
    routing = latest_routing(model)
    model(**beit3_batch("pair", [5, 3]))
    with caplog.at_level(logging.ERROR):
        report_nonfinite(model, torch.tensor(float("inf")), "validation", routing)
    line = next(line for line in caplog.messages[0].splitlines() if line.startswith("  beit3.encoder.layers.1:"))
    for loads in routing[model.beit3.encoder.layers[1]].expert_load.tolist():
        assert f"expert loads {' '.join(f'{load:.0f}' for load in loads)}" in line
    assert line.count("router entropy") == line.count("largest load over mean") == 2


# ---------------------------------------------------------------------- processes that nobody connected


@pytest.fixture
def nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("nobodys")
@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["", "1", "many"])
def test_one_process_may_train_alone(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert require_process_group() is None


@pytest.mark.usefixtures("nobodys")
def test_torchruns_processes_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE \(4\).*init_method=env://.*unset WORLD_SIZE"):
        require_process_group()


@pytest.mark.usefixtures("nobodys")
def test_slurms_tasks_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="--distributed-world-size 2 --distributed-port PORT"):
        require_process_group()


def pass_with_a_group(variable: str) -> None:
    import os

    os.environ[variable] = "2"
    require_process_group()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_connected_processes_train(workers2, variable: str) -> None:
    assert workers2.run(pass_with_a_group, variable) == [None, None]

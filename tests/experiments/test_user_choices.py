"""What the user chooses in place of an experiment's own: device, flags, processes; and what is refused of it."""

import pytest
from experiment_commands import commands, parse, trainings

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.experiments.spec import flags_of


@pytest.mark.parametrize(
    "words, on_cpu",
    [
        ((), True),
        (("--device", "cuda"), False),
        (("--scale", "paper"), False),
        (("--scale", "paper", "--device", "cpu"), True),
        (("--scale", "paper", "--", "--cpu"), True),
    ],
)
def test_the_device_is_the_trainings_and_of_all_that_follows(words: tuple[str, ...], on_cpu: bool) -> None:
    nproc = ("--models", "xmoe", "--nproc", "2")
    found = [command for command in commands("figure7", *nproc, *words) if command[1] not in ("prepare", "report")]
    assert len(found) >= 3 and all(("--cpu" in command) == on_cpu for command in found)
    trained = [command for command in found if command[0] == "torchrun"]
    assert {parse(command).distributed_backend for command in trained} == {"gloo" if on_cpu else "nccl"}


def test_the_users_flags_win_and_reach_the_preparation() -> None:
    words = "--models xmoe* --updates 40 --validations 2 --size small --data D --out O".split()
    prepare, training, *_ = commands(
        "figure8", *words, "--models", "mhmoe-params", "--", "--img-size", "32", "--lr=1e-4"
    )
    args = parse(training)
    assert (args.data, args.save_dir) == ("D", "O/mhmoe-params/seed-1")
    assert (args.max_update, args.warmup_updates, args.save_interval_updates) == (40, 4, 20)
    assert (args.arch, args.lr, args.img_size) == ("mhmoe_beit3_small", [1e-4], 32)
    assert prepare == tuple("mhmoe prepare image-text --image-size 32 --patch-size 16 --dest D".split())


@pytest.mark.parametrize("batch", [[], ["--batch", "2"]])
@pytest.mark.parametrize("nodes, nproc", [(1, 1), (1, 4), (2, 2)])
def test_an_update_is_the_same_however_many_processes_share_it(nodes: int, nproc: int, batch: list[str]) -> None:
    machine = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node0"] if nodes > 1 else []
    (words,) = trainings("table1", "--models", "mhmoe-params", "--nproc", str(nproc), *batch, *machine).values()
    args = parse(words)
    assert args.batch_size * args.update_freq[0] * nodes * nproc == 32
    if nodes * nproc == 1:
        assert words[0] == "fairseq-train" and args.distributed_world_size == 1
    else:
        meeting = (
            ("--nnodes", "2", "--node_rank", "1") if nodes > 1 else ("--standalone", "--nproc_per_node", str(nproc))
        )
        assert words[: len(meeting) + 1] == ("torchrun", *meeting)
        assert (args.ddp_backend, args.distributed_backend) == ("legacy_ddp", "gloo")


@pytest.mark.parametrize(
    "words, message",
    [
        (["tabel5"], r"NAME \(tabel5\) must be an experiment, such as table5, "),
        (
            ["table1", "--scale", "paper", "--nproc", "3"],
            r"--nproc \(3\) x --nnodes \(1\) x --batch \(4\) must divide 256",
        ),
        (["table1", "--nnodes", "2", "--node-rank", "2"], r"--node-rank \(2\) must be this machine's number, 0 to 1"),
        (["table1", "--nnodes", "2", "--node-rank", "0"], "--master-addr must be the name of machine 0"),
        (
            ["rebuttal-inference", "--jobs", "2"],
            r"--jobs \(2\) must be 1 for rebuttal-inference: it measures speed",
        ),
        (
            ["table1", "--scale", "paper", "--jobs", "2"],
            r"--jobs \(2\) must be 1 on several machines and at paper scale",
        ),
        (["table1", "--models", "bert"], r"--models \(bert\) must be a model's name \(dense, xmoe, mhmoe-params"),
        (["table1", "--lrs", "1e-3", "high"], r"--lrs \(high\) must be at least 0 and finite"),
        (["table4", "--lrs", "1e-3", "1e-4"], r"--lrs \(1e-3 1e-4\) must be one value where several kinds"),
        (["vqa", "--start", "vcr"], r"--start \(vcr\) must be one of pretraining, vqa, nlvr2"),
        (["vqa", "--start", "vqa"], r"--start \(vqa\) must not be what is trained itself"),
        (["table1", "--", "lr"], "-- lr: must begin with a flag of fairseq-train"),
        (["table1", "--updates", "few"], r"--updates \(few\) must be at least 1"),
    ],
)
def test_bad_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        commands(*words)


def test_flags_stand_behind_program_and_data_if_there_are_any() -> None:
    assert flags_of(["fairseq-train", "data", "--lr", "1", "2", "--cpu"]) == {"--lr": ("1", "2"), "--cpu": ()}
    assert flags_of(["fairseq-train", "data"]) == {}

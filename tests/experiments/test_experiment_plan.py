"""What experiments would call: commands that fairseq, the models and ``mhmoe`` accept, with the papers' settings."""

import functools
import shlex
from pathlib import Path

import pytest
from fairseq_arguments import parse_mhmoe, parse_words
from language_models import count_model

from mhmoe_fairseq.commands.main import build_parser
from mhmoe_fairseq.commands.reproduce import plans_of
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.models import MODELS
from mhmoe_fairseq.experiments.runner import dry_run
from mhmoe_fairseq.models.counts import ModelCounts, blank_dictionary
from mhmoe_fairseq.models.options import LanguageModelOptions

SCALES = ("cpu", "paper")
TABLE_1 = ["dense", "xmoe", "mhmoe-params"]


@functools.cache
def commands(*words: str) -> tuple[tuple[str, ...], ...]:
    """The words of every command of ``mhmoe reproduce WORDS --dry-run``."""
    args = build_parser("reproduce").parse_args(["reproduce", *words])
    lines = [line for plan in plans_of(args) for line in dry_run(plan)]
    return tuple(tuple(shlex.split(line)) for line in lines if not line.startswith("#"))


def unlaunched(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command that torchrun would start, for one that it starts."""
    return ("fairseq-train", *words[words.index("-m") + 2 :]) if words[0] == "torchrun" else words


@functools.cache
def parse(words: tuple[str, ...]):
    return parse_words(unlaunched(words))


@functools.cache
def counts(words: tuple[str, ...]) -> ModelCounts:
    return count_model(LanguageModelOptions.from_namespace(parse(words)), blank_dictionary(1000))


def trainings(*words: str) -> dict[str, tuple[str, ...]]:
    """Run -> its training command; the search's are :func:`searched`."""
    found = [command for command in commands(*words) if unlaunched(command)[0] == "fairseq-train"]
    names = {"/".join(Path(parse(words).save_dir).parts[2:-1]): words for words in found}
    return {name: words for name, words in names.items() if not name.startswith("search")}


def searched(*words: str) -> list[tuple[str, list[float], int]]:
    """Model, learning rate and updates of each training of the search."""
    found = [parse(command) for command in commands(*words) if unlaunched(command)[0] == "fairseq-train"]
    return [(Path(of.save_dir).parent.name, *of.lr, of.max_update) for of in found if "/search/" in of.save_dir]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_is_accepted(name: str, scale: str) -> None:
    assert commands(name, "--scale", scale)
    for command in commands(name, "--scale", scale):
        if unlaunched(command)[0] != "fairseq-train":
            assert parse_mhmoe(command)
        elif (args := parse(command)).arch.split("_")[1] == "lm" and "classification" not in args.task:
            assert counts(command).total > 0
        else:
            assert args.criterion == args.task  # named alike


def test_every_model_of_every_experiment_is_known_and_every_name_is_one_file() -> None:
    for experiment in EXPERIMENTS.values():
        assert {*experiment.models, *experiment.paper_models} <= set(MODELS)
        assert experiment.paper is None or set(experiment.paper.values) <= set(MODELS)
    reports = [(experiment.folder, experiment.report) for experiment in EXPERIMENTS.values()]
    assert len(set(reports)) == len(reports)


@pytest.mark.parametrize(
    "name, lr, decay, samples", [("table1", 5e-4, 0.01, 256), ("table1-multimodal", 2.8e-3, 0.05, 512)]
)
def test_paper_scale_is_the_papers(name: str, lr: float, decay: float, samples: int) -> None:
    args = parse(trainings(name, "--scale", "paper")["mhmoe-params"])
    side = "encoder" if "multimodal" in name else "decoder"
    shape = [getattr(args, f"{side}_{field}") for field in ("layers", "embed_dim", "ffn_embed_dim")]
    assert shape == [12, 768, 3072]
    assert (args.moe_freq, args.moe_expert_count, args.moe_top_k, args.mhmoe_heads_number) == (2, 8, 2, 4)
    assert (args.lr, args.adam_betas, args.adam_eps, args.weight_decay) == ([lr], "(0.9, 0.98)", 1e-6, decay)
    assert (args.max_update, args.warmup_updates) == (250_000, 10_000)
    assert 8 * args.batch_size * args.update_freq[0] == samples
    if side == "decoder":
        assert samples * args.tokens_per_sample == 2**20 and int(args.total_num_update) == 250_000
    else:
        assert (args.lr_scheduler, args.img_size, args.patch_size) == ("cosine", 224, 16)


# BEiT-3 base's recipes: batch, learning rate, updates, image side, text length, weight decay, layer decay, drop path.
BEIT3 = {
    "vqa": (128, 3e-5, 50_000, 480, 64, 0.01, 1.0, 0.1),
    "nlvr2": (256, 7e-4, 6_700, 224, 64, 0.2, 0.65, 0.2),
    "captioning": (256, 4e-5, 22_000, 480, 32, 0.05, 1.0, None),
    "image-classification": (1024, 7e-4, 62_500, 224, 64, 0.05, 0.65, None),
}


@pytest.mark.parametrize("task", BEIT3)
def test_fine_tuning_at_paper_scale_is_beit3s(task: str) -> None:
    args = parse(trainings(task, "--scale", "paper")[f"{task.replace('-', '_')}/dense"])
    batch = 8 * args.batch_size * args.update_freq[0]
    optimiser = (args.lr[0], args.max_update, args.img_size, args.max_text_length, args.weight_decay)
    assert (batch, *optimiser, args.layer_decay, args.drop_path_rate or None) == BEIT3[task]
    assert (args.randaug, args.head_lr_multiplier) == ((True, 20) if task == "vqa" else (False, 1))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["table1", "table1-multilingual", "table1-multimodal"])
def test_the_models_of_one_table_differ_in_the_model_alone(name: str, scale: str) -> None:
    model = ("moe_", "mhmoe_", "arch", "save_dir", "log_file", "use_xmoe")
    parsed = [vars(parse(words)) for words in trainings(name, "--scale", scale).values()]
    same = [{name: value for name, value in args.items() if not name.startswith(model)} for args in parsed]
    assert len(same) == (3 if scale == "cpu" else 5) and all(other == same[0] for other in same)


@pytest.mark.parametrize("scale", SCALES)
def test_mhmoe_keeps_xmoes_budget(scale: str) -> None:
    models = trainings("table1", "--scale", scale, "--models", "xmoe", "mhmoe-params", "mhmoe-flops")
    xmoe, params, flops = map(counts, models.values())
    assert 0.995 * xmoe.total <= params.total <= xmoe.total
    assert flops.flops_per_token == pytest.approx(xmoe.flops_per_token, rel=0.01)


def test_the_official_recipe_is_a_multi_head_model_with_its_flags() -> None:
    words = trainings("official", "--scale", "paper")["official-h4"]
    moe, args = counts(words).moe, parse(words)
    assert "--mhmoe-heads-number" in words
    assert (moe.num_heads, moe.num_experts, moe.top_k, moe.expert_ffn_dim) == (4, 8, 1, 2048)
    assert (moe.routing, moe.router, moe.activation, moe.expert_bias) == ("capacity", "linear", "swiglu", False)
    assert (moe.normalize_before_dropping, moe.eval_capacity_fraction) == (True, -1.0)
    assert (args.moe_gate_loss_combine_method, args.moe_gate_loss_wt) == ("sum", 0.01)
    assert (args.lr, args.end_learning_rate, args.warmup_updates, args.max_update) == ([6e-4], 3e-5, 375, 100_000)
    assert 8 * args.batch_size * args.update_freq[0] * args.tokens_per_sample == 512 * 2048


def test_tables_5_6_and_7_vary_heads_components_and_projections() -> None:
    for scale, heads in (("cpu", [1, 2, 4, 8, 16]), ("paper", [1, 2, 4, 6, 8, 12])):
        found = [counts(words).moe.num_heads for words in trainings("table5", "--scale", scale).values()]
        assert sorted(found) == heads
    moe = {name: counts(words).moe for name, words in trainings("table6", "--scale", "paper").items()}
    assert moe.pop("dense") is None
    parts = {
        name: (c.num_experts > 1, c.subtokens_per_token > 1, c.has_head_projection, c.has_merge_projection)
        for name, c in moe.items()
    }
    assert parts == {
        "dense-projections": (False, False, True, True),
        "xmoe": (True, False, False, False),
        "xmoe-projections": (True, False, True, True),
        "mhmoe-params-no-splitting": (True, False, True, True),
        "mhmoe-params-no-projections": (True, True, False, False),
        "mhmoe-params": (True, True, True, True),
    }
    layers = [counts(words).moe for words in trainings("table7", "--scale", "paper").values()]
    assert [config.num_projection_layers for config in layers] == [0, 1, 2, 3]


def test_several_languages_have_the_papers_models_and_table_3_takes_them_all() -> None:
    table_1 = trainings("table1-multilingual", "--scale", "paper")
    experts = {name: getattr(counts(words).moe, "num_experts", 0) for name, words in table_1.items()}
    assert experts == {"dense": 0, "xmoe": 8, "mhmoe-params": 8, "xmoe-e32": 32, "mhmoe-params-e32": 32}
    assert trainings("table3", "--scale", "paper") == table_1  # the very same runs
    (xnli,) = [command for command in commands("table3", "--scale", "paper") if "xnli" in command]
    at = xnli.index("--checkpoint") + 1
    assert [Path(word).parent.name for word in xnli[at : at + 5]] == list(experts)


def test_table_4_fine_tunes_the_models_of_table_1_which_are_trained_first_if_missing() -> None:
    for scale, statements in (("cpu", "vqa/"), ("paper", "")):  # what statements start from
        runs = trainings("table4", "--scale", scale)
        assert list(runs) == [
            *TABLE_1, *(f"vqa/{model}" for model in TABLE_1), *(f"nlvr2/{model}" for model in TABLE_1),
            "captioning/dense", "captioning/mhmoe-params",
        ]  # fmt: skip
        for name, words in runs.items():
            if "/" in name:
                task, model = name.split("/")
                start = (statements if task == "nlvr2" else "") + model
                expected = f"outputs/masked_multimodal/{start}/seed-1/checkpoint_best.pt"
                assert parse(words).finetune_from_model == expected
    (started,) = [
        words for name, words in trainings("nlvr2", "--start", "pretraining", "--models", "xmoe").items() if "/" in name
    ]
    assert parse(started).finetune_from_model == "outputs/masked_multimodal/xmoe/seed-1/checkpoint_best.pt"


def test_the_whole_experiment_keeps_mhmoes_flops_and_its_checkpoints() -> None:
    runs = trainings("multimodal")
    assert len(runs) == 3 + 3 + 3 + 2 and not any("params" in name for name in runs)
    kept = {parse(words).task: parse(words).keep_interval_updates for words in runs.values()}
    assert kept["mhmoe_masked_multimodal"] == -1 and kept["mhmoe_vqa"] == 1
    assert parse(trainings("figure8", "--scale", "paper")["mhmoe-params-kept"]).keep_interval_updates == -1


def test_learning_rates_are_searched_for_every_model_and_then_all_seeds_trained() -> None:
    assert len(commands("study-multimodal")) == 1 + 3 * 3 + 3 * 3 * 2 + 1
    assert searched("study-multimodal")[0] == ("dense", 1e-3, 150)
    lrs, models = (2e-3, 4e-3, 8e-3), EXPERIMENTS["study"].models
    assert searched("study") == [(model, lr, 200) for model in models for lr in lrs]
    assert searched("study", "--models", "xmoe", "--updates", "7") == [("xmoe", lr, 7) for lr in lrs]  # never longer
    assert not searched("study", "--scale", "paper") and not searched("study", "--", "--lr", "1e-3")
    given = ("table1", "--lrs", "1e-3", "2e-3", "--search-updates", "7", "--models", "dense", "--seeds", "4", "5")
    args = [parse(words) for words in commands(*given) if words[0] == "fairseq-train"]
    assert [(of.max_update, of.lr, of.seed) for of in args[:2]] == [(7, [1e-3], 4), (7, [2e-3], 4)]
    assert [(of.max_update, of.seed) for of in args[2:]] == [(1000, 4), (1000, 5)]
    (only,) = trainings("table1", "--lrs", "1e-3", "--models", "dense").values()
    assert parse(only).lr == [1e-3] and not searched("table1", "--lrs", "1e-3")


def test_the_users_flags_win_and_reach_the_preparation() -> None:
    words = [
        "--models",
        "xmoe*",
        "--updates",
        "40",
        "--validations",
        "2",
        "--size",
        "small",
        "--data",
        "D",
        "--out",
        "O",
    ]
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
        (["table2"], r"NAME \(table2\) must be one of demo, table1"),
        (
            ["table1", "--scale", "paper", "--nproc", "3"],
            r"--nproc \(3\) x --nnodes \(1\) x --batch \(4\) must divide 256",
        ),
        (["table1", "--nnodes", "2", "--node-rank", "2"], r"--node-rank \(2\) must be this machine's number, 0 to 1"),
        (["table1", "--nnodes", "2", "--node-rank", "0"], "--master-addr must be the name of machine 0"),
        (
            ["table1", "--scale", "paper", "--jobs", "2"],
            r"--jobs \(2\) must be 1 on several machines and at paper scale",
        ),
        (["table1", "--models", "bert"], r"--models \(bert\) must be a model's name \(dense, xmoe, mhmoe-params"),
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

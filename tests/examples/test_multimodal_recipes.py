"""The recipes for images and text: their commands are accepted, and a toy run goes from images to table 4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fairseq_arguments import parse_mhmoe
from image_text_data import IMG_SIZE, PATCH_SIZE, prepare_shapes
from own_scripts import Scripts
from test_recipes import EXAMPLES, SCALES, bash, commands, parse, unlaunched

EXPERIMENT = "masked_multimodal"
TASKS = ("vqa", "nlvr2", "captioning", "image_classification", "retrieval")
RECIPES = sorted(
    f"{EXPERIMENT}/{path.stem}"
    for path in (EXAMPLES / EXPERIMENT).glob("*.sh")
    if path.stem not in ("common", "prepare", "finetune")
)
NAME = "mhmoe-params"


def trainings(recipe: str, scale: str, *flags: str) -> list:
    """fairseq's parsed arguments of every training of a recipe."""
    words = commands(f"{EXPERIMENT}/{recipe}", scale, *flags)
    return [parse(command) for command in words if unlaunched(command)[0] == "fairseq-train"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", [*RECIPES, *(f"{EXPERIMENT}/finetune {task}" for task in TASKS)])
def test_every_command_is_accepted(recipe: str, scale: str) -> None:
    name, *flags = recipe.split()
    words = commands(name, scale, *flags)
    assert words
    for command in words:
        if unlaunched(command)[0] == "fairseq-train":
            args = parse(command)
            assert args.criterion == args.task  # named alike
            assert args.arch.endswith("_beit3_base" if scale == "paper" else "_beit3_tiny")
        else:
            assert parse_mhmoe(command)


def test_paper_scale_is_the_papers() -> None:
    (args,) = trainings("mhmoe", "paper")
    assert (args.encoder_layers, args.encoder_embed_dim, args.encoder_ffn_embed_dim) == (12, 768, 3072)
    assert (args.moe_freq, args.moe_expert_count, args.moe_top_k, args.mhmoe_heads_number) == (2, 8, 2, 4)
    assert (args.lr, args.adam_betas, args.adam_eps, args.weight_decay) == ([2.8e-3], "(0.9, 0.98)", 1e-6, 0.05)
    assert (args.lr_scheduler, args.warmup_updates) == ("cosine", 10_000)
    assert (args.img_size, args.patch_size) == (224, 16)
    assert 8 * args.batch_size * args.update_freq[0] == 512


# BEiT-3 base's recipes: batch, learning rate, updates, image side, text length, weight decay, layer decay, drop path.
BEIT3 = {
    "vqa": (128, 3e-5, 50_000, 480, 64, 0.01, 1.0, 0.1),
    "nlvr2": (256, 7e-4, 6_700, 224, 64, 0.2, 0.65, 0.2),
    "captioning": (256, 4e-5, 22_000, 480, 32, 0.05, 1.0, None),
    "image_classification": (1024, 7e-4, 62_500, 224, 64, 0.05, 0.65, None),
}


@pytest.mark.parametrize("task", BEIT3)
def test_fine_tuning_at_paper_scale_is_beit3s(task: str) -> None:
    args = trainings("finetune", "paper", task)[0]
    batch = 8 * args.batch_size * args.update_freq[0]
    optimiser = (args.lr[0], args.max_update, args.img_size, args.max_text_length, args.weight_decay)
    assert (batch, *optimiser, args.layer_decay, args.drop_path_rate or None) == BEIT3[task]
    assert (args.randaug, args.head_lr_multiplier) == ((True, 20) if task == "vqa" else (False, 1))


def test_the_name_of_a_run_tells_experts_and_budget() -> None:
    found = trainings("finetune", "cpu", "vqa", "xmoe-e32", "mhmoe-flops-e16", "mhmoe-params")
    assert [args.moe_expert_count for args in found] == [32, 16, 8]
    assert [str(args.mhmoe_budget) for args in found[1:]] == ["flops", "params"]


@pytest.mark.parametrize("scale", SCALES)
def test_the_models_of_one_scale_differ_in_the_model_alone(scale: str) -> None:
    model = ("moe_", "mhmoe_", "arch", "save_dir", "log_file", "use_xmoe")
    parsed = [vars(trainings(recipe, scale)[0]) for recipe in ("dense", "xmoe", "mhmoe")]
    same = [{name: value for name, value in args.items() if not name.startswith(model)} for args in parsed]
    assert same[0] == same[1] == same[2]


def test_table_4_fine_tunes_the_models_of_table_1() -> None:
    runs = trainings("table4", "cpu")
    by_task: dict[str, list[str]] = {}
    for args in runs:
        by_task.setdefault(args.task, []).append(Path(args.save_dir).name)
    models = ["dense", "xmoe-e8", "mhmoe-params-e8"]
    assert by_task == {
        "mhmoe_masked_multimodal": models, "mhmoe_vqa": models, "mhmoe_nlvr2": models,
        "mhmoe_captioning": ["dense", "mhmoe-params-e8"],
    }  # fmt: skip
    out = f"outputs/{EXPERIMENT}"
    for args in runs:
        if args.task != "mhmoe_masked_multimodal":
            origin = f"{out}/vqa" if args.task == "mhmoe_nlvr2" else out
            assert args.finetune_from_model == f"{origin}/{Path(args.save_dir).name}/checkpoint_best.pt"


@pytest.mark.parametrize("scale, start", [("cpu", "vqa/"), ("paper", "")])
def test_statements_start_from_questions_at_cpu_scale_alone(scale: str, start: str) -> None:
    (args,) = trainings("finetune", scale, "nlvr2", "dense")
    assert args.finetune_from_model == f"outputs/{EXPERIMENT}/{start}dense/checkpoint_best.pt"


def test_the_whole_experiment_trains_each_model_once() -> None:
    runs = trainings("all", "cpu")
    assert len({args.save_dir for args in runs}) == len(runs) == 3 + 3 + 3 + 2
    kept = {args.task: args.keep_interval_updates for args in runs}
    assert kept["mhmoe_masked_multimodal"] == -1 and kept["mhmoe_vqa"] == 1


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        (["vcr"], {}, "TASK (vcr) must be vqa, nlvr2, captioning"),
        (["vqa", "bert"], {"DRY_RUN": "1"}, "bert must start with dense, xmoe or mhmoe"),
        (["vqa", "dense"], {"OUT": "nowhere"}, "nowhere/dense/checkpoint_best.pt is missing: pre-train it first"),
        (["nlvr2", "dense"], {"OUT": "nowhere"}, "vqa/dense/checkpoint_best.pt is missing: fine-tune it on vqa first"),
        (["nlvr2", "dense"], {"START": "vcr", "DRY_RUN": "1"}, "START (vcr) must be pretraining or a task"),
        (["vqa", "dense"], {"START": "vqa", "DRY_RUN": "1"}, "START (vqa) must not be TASK itself"),
        (["vqa", "dense"], {"TASK_UPDATES": "few"}, "UPDATES (few) must be a positive integer"),
    ],
)
def test_bad_settings_of_fine_tuning_are_one_line(flags: list[str], environment: dict, message: str) -> None:
    done = bash(EXAMPLES / EXPERIMENT / "finetune.sh", *flags, **environment)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    """The recipes at toy size, on a folder of shapes."""
    folder = tmp_path_factory.mktemp("recipes")
    data = prepare_shapes(folder / "data")
    sizes = {"IMG_SIZE": str(IMG_SIZE), "PATCH_SIZE": str(PATCH_SIZE)}
    return Scripts(
        folder, DATA=str(data), OUT=str(folder / "out"), UPDATES="2", TASK_UPDATES="2", INTERVALS="1", EXPERTS="4",
        **sizes,
    )  # fmt: skip


def test_from_images_to_a_report_and_scores(scripts: Scripts) -> None:
    out = Path(scripts.environment["OUT"])
    trained = scripts.run(f"examples/{EXPERIMENT}/mhmoe.sh")
    assert f"{NAME}: training, 2 updates" in trained and "update 2: validation perplexity" in trained
    scripts.run(f"examples/{EXPERIMENT}/eval.sh", NAME)
    assert "14.73" in (out / "report.md").read_text(encoding="utf-8")  # the paper's MH-MoE with 8 experts
    scripts.run(f"examples/{EXPERIMENT}/finetune.sh", "nlvr2", NAME, START="pretraining")
    scores = json.loads((out / "nlvr2" / NAME / "scores-test.json").read_text(encoding="utf-8"))
    assert 0 <= scores["figures"]["accuracy"] <= 100 and scores["count"] > 0
    again = scripts.run(f"examples/{EXPERIMENT}/finetune.sh", "nlvr2", NAME, START="pretraining")
    assert "already trained" in again


@pytest.mark.slow
def test_fine_tuning_starts_afresh_from_another_checkpoint(scripts: Scripts) -> None:
    out = Path(scripts.environment["OUT"])
    scripts.run(f"examples/{EXPERIMENT}/mhmoe.sh")
    scripts.run(f"examples/{EXPERIMENT}/finetune.sh", "vqa", NAME)
    before = json.loads((out / "vqa" / NAME / "scores-test.json").read_text(encoding="utf-8"))["checkpoint_sha256"]
    scripts.run(f"examples/{EXPERIMENT}/mhmoe.sh", SEED="2")
    assert "start have changed, starting afresh" in scripts.run(f"examples/{EXPERIMENT}/finetune.sh", "vqa", NAME)
    after = json.loads((out / "vqa" / NAME / "scores-test.json").read_text(encoding="utf-8"))["checkpoint_sha256"]
    assert after != before


@pytest.mark.slow
def test_the_whole_experiment_in_one_command(scripts: Scripts) -> None:
    out = Path(scripts.environment["OUT"])
    scripts.run(f"examples/{EXPERIMENT}/all.sh", INTERVALS="2", IMAGES="2", EXPERTS_LIST="8")
    assert "14.73" in (out / "table1-multimodal.md").read_text(encoding="utf-8")
    table = (out / "table4.md").read_text(encoding="utf-8")
    assert all(name in table for name in ("dense", "xmoe-e8", "mhmoe-flops-e8", "CIDEr", "neither VQAv2 nor NLVR2"))
    assert (out / "figure8" / "diversity.png").stat().st_size > 0
    assert not (out / "figure8-mhmoe-params").exists()  # the model of table 1 kept its checkpoints
    scripts.run(f"examples/{EXPERIMENT}/figure8.sh", INTERVALS="2", IMAGES="2")
    assert (out / "figure8-mhmoe-params" / "finished").exists()

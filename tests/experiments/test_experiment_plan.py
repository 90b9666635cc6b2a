"""What experiments would call: commands that fairseq, the models and ``mhmoe`` accept, with the papers' settings."""

import functools
from pathlib import Path

import pytest
from experiment_commands import commands, parse, trainings, unlaunched
from fairseq_arguments import parse_mhmoe
from language_models import count_model

from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.models import MODELS
from mhmoe_fairseq.models.counts import ModelCounts, blank_dictionary
from mhmoe_fairseq.models.flags import decoder_settings
from mhmoe_fairseq.models.options import LanguageModelOptions
from mhmoe_fairseq.moe import MHMoEConfig

SCALES = ("cpu", "paper")
TABLE_1 = ["dense", "xmoe", "mhmoe-params"]


def moe_of(words: tuple[str, ...]) -> MHMoEConfig | None:
    """A language model's MoE layers."""
    return decoder_settings(LanguageModelOptions.from_namespace(parse(words)), 1000).moe


@functools.cache
def counts(words: tuple[str, ...]) -> ModelCounts:
    return count_model(LanguageModelOptions.from_namespace(parse(words)), blank_dictionary(1000))


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
            assert moe_of(command) is None or "dense_" not in args.arch
        else:
            assert args.criterion == args.task  # named alike


def test_every_model_of_every_experiment_is_known_and_every_name_is_one_file() -> None:
    for experiment in EXPERIMENTS.values():
        assert {*experiment.models, *experiment.paper_models} <= set(MODELS)
        assert experiment.paper is None or set(experiment.paper.values) <= set(MODELS)
        claimed = {name for claim in experiment.claims for name in (claim.model, claim.reference)}
        assert claimed <= {*experiment.models, *experiment.paper_models}
        assert experiment.claims or experiment.source[:2] != "P2"
        assert len({claim.text for claim in experiment.claims}) == len(experiment.claims)
    (more_heads,) = [of for of in EXPERIMENTS["p2-table1"].claims if of.reference == "mhmoe-swiglu-h2"]
    assert (more_heads.model, more_heads.paper) == ("mhmoe-swiglu-h3", "-1.8 %")  # 10.51 against 10.70
    assert more_heads.text == "mhmoe-swiglu-h3 has a lower perplexity than mhmoe-swiglu-h2"
    assert EXPERIMENTS["table3"].claims[1].paper == "+0.6 points"  # 34.7 against 34.1
    for row in EXPERIMENTS["table2"].paper.values.values():  # the paper's avg is the mean of its 14 columns
        assert abs(sum(list(row.values())[:14]) / 14 - row["avg"]) < 0.07
    assert EXPERIMENTS["table2"].claims[1].paper == "+1.2 points"
    # Shares differ by points, as ours do; CIDEr, which is none, by percent.
    assert [claim.paper for claim in EXPERIMENTS["table4"].claims] == ["+1.7 points", "+1.7 points", "+3.0 %"]
    assert {claim.paper for name in ("figure1", "figure5") for claim in EXPERIMENTS[name].claims} == {"+82.4 points"}
    of_tasks = [(claim.part, claim.paper) for claim in EXPERIMENTS["table7"].claims if claim.part]
    assert of_tasks == [("RTE acc", "+0.5 points"), ("PIQA acc", "+1.1 points"), ("Winogrande acc", "+2.1 points")]
    assert EXPERIMENTS["p2-table5"].claims[0].paper == "-1.9 % at 50k"
    reports = [(experiment.folder, experiment.report) for experiment in EXPERIMENTS.values()]
    assert len(set(reports)) == len(reports)


# What the papers say of a training (P1 section 2 and tables 9 and 10; P2 and its authors' script; the rebuttal). The
# length of a block is ours where it makes the papers' tokens for a batch. BEiT-3 base's recipes of fine-tuning say no
# warm-up.
FIELDS = (
    "lr adam_betas adam_eps weight_decay clip_norm dropout lr_scheduler warmup_updates max_update samples block layers "
    "width attention_heads ffn"
).split()
P1_LM = (5e-4, "(0.9, 0.98)", 1e-6, 0.01, 0.0, 0.1, "polynomial_decay", 10_000, 250_000, 256, 4096, 12, 768, 12, 3072)
P1_MULTIMODAL = (2.8e-3, "(0.9, 0.98)", 1e-6, 0.05, 0.0, 0.1, "cosine", 10_000, 250_000, 512, 64, 12, 768, 12, 3072)
SCRIPT = (6e-4, "(0.9, 0.95)", 1e-6, 0.1, 2.0, 0.1, "polynomial_decay", 375, 100_000, 512, 2048, 12, 768, 12, 2048)
P2_LM = (*SCRIPT[:9], 256, *SCRIPT[10:])
PAPER = {
    **dict.fromkeys(("table1", "table5", "table6", "table7", "study"), P1_LM),
    **dict.fromkeys(("figure1", "figure4", "figure6", "figure7"), P1_LM),
    **dict.fromkeys(("table1-multilingual", "table2", "table3", "figure5"), P1_LM),
    **dict.fromkeys(("table1-multimodal", "figure8"), P1_MULTIMODAL),
    **dict.fromkeys(("p2-table1", "p2-table2", "p2-table3", "p2-table4", "p2-table5"), P2_LM),
    "p2-table3-two-stage": (1.5e-3, *P2_LM[1:6], "mhmoe_two_stage", *P2_LM[7:]),
    "official": SCRIPT,
    "rebuttal-top-k": (6e-4, *P1_LM[1:7], 2_500, 25_000, 256, 2048, 6, *P1_LM[12:]),
    "rebuttal-activation": (6e-4, *P1_LM[1:7], 2_000, 20_000, 256, 2048, 3, *P1_LM[12:]),
    "rebuttal-balance": P1_LM,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_trainings_at_paper_scale_are_the_papers(name: str) -> None:
    for words in trainings(name, "--scale", "paper").values():
        args = parse(words)
        side = args.arch.split("_")[1] == "beit3"
        stack = "encoder" if side else "decoder"
        found = {
            **vars(args),
            "lr": args.lr[0],
            "samples": 8 * args.batch_size * args.update_freq[0],
            "block": args.max_text_length if side else args.tokens_per_sample,
            "layers": getattr(args, f"{stack}_layers"),
            "width": getattr(args, f"{stack}_embed_dim"),
            "attention_heads": getattr(args, f"{stack}_attention_heads"),
            "ffn": getattr(args, f"{stack}_ffn_embed_dim"),
        }
        assert tuple(found[field] for field in FIELDS) == PAPER[name]
        assert args.moe_gate_loss_wt == 0.01 and args.seed == 1  # one training of each model
        if side:
            assert (args.img_size, args.patch_size) == (224, 16)
        elif args.lr_scheduler == "polynomial_decay":
            assert int(args.total_num_update) == args.max_update
            assert args.end_learning_rate == (3e-5 if args.warmup_updates == 375 else 0.0)


# Experts, top-k, heads, sub-tokens, inner width (None: the budget's), inner LayerNorm, router and its width, shared
# expert, head and merge projection, layers in each.
GELU, SWIGLU = (True, "xmoe"), (False, "linear", 16)
PAPER_TABLE_1 = {
    "xmoe": (8, 2, 1, 1, 3072, *GELU, 16, 0, False, False, 1),
    "mhmoe-params": (8, 2, 4, 4, None, *GELU, 4, 0, True, True, 1),
    "xmoe-e32": (32, 2, 1, 1, 3072, *GELU, 16, 0, False, False, 1),
    "mhmoe-params-e32": (32, 2, 4, 4, None, *GELU, 4, 0, True, True, 1),
}
P2_TABLE_1 = {
    "smoe-swiglu": (8, 1, 1, 1, 2048, *SWIGLU, 0, False, False, 1),
    "fine-grained": (16, 2, 1, 1, 1024, *SWIGLU, 0, False, False, 1),
    "mhmoe-swiglu-h2": (40, 2, 2, 2, 768, *SWIGLU, 0, True, True, 1),
    "mhmoe-swiglu-h3": (96, 3, 3, 3, 512, *SWIGLU, 0, True, True, 1),
}
PAPER_MODELS = {
    **dict.fromkeys(("table1", "figure4", "table1-multilingual", "table3", "rebuttal-balance"), PAPER_TABLE_1),
    **dict.fromkeys(("figure1", "figure5"), {of: PAPER_TABLE_1[of] for of in ("xmoe-e32", "mhmoe-params-e32")}),
    "table5": {
        "xmoe": (8, 2, 1, 1, 3072, *GELU, 16, 0, False, False, 1),
        **{
            f"mhmoe-params{name}": (8, 2, heads, heads, None, *GELU, round(16 / heads), 0, True, True, 1)
            for name, heads in (("-h2", 2), ("", 4), ("-h6", 6), ("-h8", 8), ("-h12", 12))
        },
    },
    "table6": {
        "dense-projections": (1, 1, 1, 1, 3072, *GELU, 16, 0, True, True, 1),
        "xmoe": (8, 2, 1, 1, 3072, *GELU, 16, 0, False, False, 1),
        "xmoe-projections": (8, 2, 1, 1, 3072, *GELU, 16, 0, True, True, 1),
        "mhmoe-params-no-splitting": (8, 2, 4, 1, None, *GELU, 4, 0, True, True, 1),
        "mhmoe-params-no-projections": (8, 2, 4, 4, None, *GELU, 4, 0, False, False, 0),
        "mhmoe-params": (8, 2, 4, 4, None, *GELU, 4, 0, True, True, 1),
    },
    "table7": {
        f"mhmoe-params{name}": (8, 2, 4, 4, None, *GELU, 4, 0, layers > 0, layers > 0, layers)
        for name, layers in (("-no-projections", 0), ("", 1), ("-projections-2", 2), ("-projections-3", 3))
    },
    "official": {"official-h4": (8, 1, 4, 4, 2048, *SWIGLU, 0, True, True, 1)},
    "p2-table1": P2_TABLE_1,
    **dict.fromkeys(
        ("p2-table3", "p2-table3-two-stage"), {f"{name}-bitnet": of for name, of in P2_TABLE_1.items()}
    ),
    "p2-table2": {
        "smoe-swiglu-shared": (8, 1, 1, 1, 2048, *SWIGLU, 2048, False, False, 1),
        "fine-grained-shared": (16, 2, 1, 1, 1024, *SWIGLU, 2048, False, False, 1),
        "mhmoe-swiglu-h2-shared": (40, 2, 2, 2, 768, *SWIGLU, 2048, True, True, 1),
        "mhmoe-swiglu-h3-shared": (96, 3, 3, 3, 512, *SWIGLU, 2048, True, True, 1),
    },
    "p2-table4": {
        "smoe-swiglu": (8, 1, 1, 1, 2048, *SWIGLU, 0, False, False, 1),
        "smoe-swiglu-projections": (8, 1, 1, 1, 2048, *SWIGLU, 0, True, True, 1),
        "fine-grained": (16, 2, 1, 1, 1024, *SWIGLU, 0, False, False, 1),
        "fine-grained-projections": (16, 2, 1, 1, 1024, *SWIGLU, 0, True, True, 1),
        "mhmoe-swiglu-h2-no-projections": (40, 2, 2, 2, 768, *SWIGLU, 0, False, False, 1),
        "mhmoe-swiglu-h2": (40, 2, 2, 2, 768, *SWIGLU, 0, True, True, 1),
    },
    "p2-table5": {
        "mhmoe-swiglu-h2-no-projections": (40, 2, 2, 2, 768, *SWIGLU, 0, False, False, 1),
        "mhmoe-swiglu-h2-head-only": (40, 2, 2, 2, 768, *SWIGLU, 0, True, False, 1),
        "mhmoe-swiglu-h2-merge-only": (40, 2, 2, 2, 768, *SWIGLU, 0, False, True, 1),
        "mhmoe-swiglu-h2": (40, 2, 2, 2, 768, *SWIGLU, 0, True, True, 1),
    },
    "rebuttal-top-k": {
        f"{model}-k{top_k}": (8, top_k, heads, heads, width, *GELU, 16 // heads, 0, heads > 1, heads > 1, 1)
        for top_k in (3, 4) for model, heads, width in (("xmoe", 1, 3072), ("mhmoe-params-h2", 2, None))
    },
    "rebuttal-activation": {
        "smoe-e128-k1": (128, 1, 1, 1, 3072, True, "linear", 16, 0, False, False, 1),
        "smoe-e256": (256, 2, 1, 1, 3072, True, "linear", 16, 0, False, False, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_models_at_paper_scale_are_the_papers(name: str) -> None:
    found = {}
    for model, words in trainings(name, "--scale", "paper").items():
        layer, args = moe_of(words), parse(words)
        if layer is None:
            assert args.moe_freq == 0
            continue
        name_of = Path(model).name
        assert args.moe_freq == 2 and layer.subtoken_residual is False
        assert layer.router != "xmoe" or (layer.router_normalize, layer.router_temperature) == ("both", 0.3)
        width = None if PAPER_MODELS[name][name_of][4] is None else layer.expert_ffn_dim
        found[name_of] = (
            layer.num_experts, layer.top_k, layer.num_heads, layer.subtokens_per_token, width, layer.expert_layernorm,
            layer.router, layer.router_dim, layer.shared_expert_dim, layer.has_head_projection,
            layer.has_merge_projection, layer.num_projection_layers,
        )  # fmt: skip
    assert found == PAPER_MODELS[name]


@pytest.mark.parametrize("name", ["p2-table3", "p2-table3-two-stage"])
def test_bitnet_quantizes_all_maps_and_its_own_recipe_has_two_stages(name: str) -> None:
    models = trainings(name, "--scale", "paper")
    assert [Path(model).name for model in models] == [f"{model}-bitnet" for model in ("dense-swiglu", *P2_TABLE_1)]
    for words in models.values():
        args, layer = parse(words), moe_of(words)
        assert args.mhmoe_quantize == "all" and (layer is None or layer.quantize_experts)
        if name == "p2-table3-two-stage":
            assert (args.second_lr, args.second_weight_decay) == (1e-3, 0.0)


def test_figure_6_goes_from_8_to_256_experts_at_both_scales() -> None:
    for scale in SCALES:
        experts = [
            (of.num_heads, of.num_experts) for of in map(moe_of, trainings("figure6", "--scale", scale).values())
        ]
        assert experts == [(heads, 2**of) for of in range(3, 9) for heads in (1, 4)]


@pytest.mark.parametrize("scale", SCALES)
def test_the_second_papers_models_spend_alike(scale: str) -> None:
    models = {Path(name).name: counts(words) for name, words in trainings("p2-table1", "--scale", scale).items()}
    sparse = models["smoe-swiglu"]

    def but_for_the_router(of: MHMoEConfig) -> int:
        return of.flops_per_token() - 2 * of.inner_dim * of.num_experts

    for name in ("fine-grained", "mhmoe-swiglu-h2", "mhmoe-swiglu-h3"):
        assert but_for_the_router(models[name].moe) == but_for_the_router(sparse.moe)
        # Up to 96 experts to score, in a model that is narrow at CPU scale.
        assert models[name].flops_per_token == pytest.approx(sparse.flops_per_token, rel=0.03)
        assert models[name].expert == pytest.approx(sparse.expert, rel=0.08)  # what projections take, experts lack


@pytest.mark.parametrize("scale", SCALES)
def test_the_family_has_one_budget_but_for_what_it_says(scale: str) -> None:
    names = [name for name in EXPERIMENTS["family"].models if name != "btx"]  # smoe's: test_branches
    layers = {name: moe_of(words) for name, words in trainings("family", "--scale", scale, "--models", *names).items()}
    params, flops = (
        {
            name: of / getattr(layers["smoe"], count)()
            for name, layer in layers.items()
            for of in [getattr(layer, count)()]
        }
        for count in ("num_params", "flops_per_token")
    )
    assert (params.pop("demix"), flops.pop("demix")) == (pytest.approx(11 / 8, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert all(of == pytest.approx(1, abs=0.06) for of in params.values()), params
    assert flops.pop("lory") == pytest.approx(1, abs=0.09)
    assert all(of == pytest.approx(1, abs=0.04) for of in flops.values()), flops


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
    assert len(same) >= 5 and all(other == same[0] for other in same)


@pytest.mark.parametrize("scale", SCALES)
def test_mhmoe_keeps_xmoes_budget(scale: str) -> None:
    names = ("xmoe", "xmoe-g4", "mhmoe-params", "mhmoe-params-g2", "mhmoe-flops", "mhmoe-flops-g4")
    models = trainings("table1", "--scale", scale, "--models", *names)
    xmoe, *of_xmoe, params, finer, flops, of_heads = (counts(models[name]) for name in names)
    assert all(0.995 * xmoe.total <= of.total <= xmoe.total for of in (params, finer))
    for same in (*of_xmoe, flops, of_heads):
        assert same.flops_per_token == pytest.approx(xmoe.flops_per_token, rel=0.02)
    assert [of.moe.top_k for of in (*of_xmoe, finer, flops, of_heads)] == [8, 4, 2, 8]


def test_the_official_recipe_is_a_multi_head_model_with_its_flags() -> None:
    words = trainings("official", "--scale", "paper")["official/official-h4"]
    moe = moe_of(words)
    assert "--mhmoe-heads-number" in words and parse(words).moe_gate_loss_combine_method == "sum"
    assert (moe.routing, moe.activation, moe.expert_bias) == ("capacity", "swiglu", False)
    assert (moe.normalize_before_dropping, moe.eval_capacity_fraction) == (True, -1.0)


def test_heads_at_cpu_scale_divide_its_width() -> None:
    assert [moe_of(words).num_heads for words in trainings("table5").values()] == [1, 2, 4, 8]


@pytest.mark.parametrize("scale", SCALES)
def test_tables_share_the_runs_of_table_1(scale: str) -> None:
    table_1 = trainings("table1-multilingual", "--scale", scale)
    assert trainings("table3", "--scale", scale) == table_1
    (xnli,) = [command for command in commands("table3", "--scale", scale, "--seeds", "1") if "xnli" in command]
    at = xnli.index("--checkpoint") + 1
    assert [Path(word).parent.name for word in xnli[at : at + 5]] == list(table_1)
    english = trainings("table1", "--scale", scale)
    table_5 = trainings("table5", "--scale", scale)
    assert trainings("table2", "--scale", scale) == {of: english[of] for of in trainings("table2", "--scale", scale)}
    (zero_shot,) = [of for of in commands("table2", "--scale", scale) if of[:3] == ("mhmoe", "zero-shot", "english")]
    for name, tasks in {"table7": ("--tasks", "rte,piqa,winogrande"), "figure1": (), "figure6": ()}.items():
        found = commands(name, "--scale", scale)
        assert ("mhmoe", "prepare", "zero-shot", "--dest", "data/zero-shot") in found
        (follow_up,) = [of for of in found if of[:3] == ("mhmoe", "zero-shot", "english")]
        named = tuple(word for word in follow_up[follow_up.index("--out") + 2 :] if word != "--cpu")
        assert named == tasks  # all where none is named
        runs = [parse(words).save_dir for words in trainings(name, "--scale", scale).values()]
        assert {*follow_up} >= {*zero_shot[-4:], *runs}
    assert trainings("figure5", "--scale", scale).items() <= table_1.items()
    assert [of[2] for of in commands("figure5", "--scale", scale) if of[1] == "zero-shot"] == ["xnli"]
    assert trainings("figure7", "--scale", scale).items() <= table_5.items()
    assert {"--polysemy", "data/words/words.json"} <= {*commands("figure7", "--scale", scale)[-1]}
    assert ("mhmoe", "prepare", "words", "--dest", "data/words") in commands("figure7", "--scale", scale)
    for name in ("study", "table5", "table6", "table7", "figure1", "figure4", "figure6"):
        runs = trainings(name, "--scale", scale)
        assert runs.keys() & english.keys() and all(runs[of] == english[of] for of in runs.keys() & english.keys())


def test_table_4_fine_tunes_the_models_of_table_1_which_are_trained_first_if_missing() -> None:
    for scale, statements in (("cpu", "vqa/"), ("paper", "")):  # what statements start from
        runs = trainings("table4", "--scale", scale, "--seeds", "1")
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
        words
        for name, words in trainings("nlvr2", "--start", "pretraining", "--models", "xmoe", "--seeds", "1").items()
        if "/" in name
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
    lrs, models = (4e-3, 8e-3, 1.6e-2), EXPERIMENTS["study"].models
    assert searched("study") == [(model, lr, 200) for model in models for lr in lrs]
    assert searched("study", "--models", "xmoe", "--updates", "7") == [("xmoe", lr, 7) for lr in lrs]  # never longer
    assert not searched("study", "--scale", "paper") and not searched("study", "--", "--lr", "1e-3")
    given = ("table1", "--lrs", "1e-3", "2e-3", "--search-updates", "7", "--models", "dense", "--seeds", "4", "5")
    args = [parse(words) for words in commands(*given) if words[0] == "fairseq-train"]
    assert [(of.max_update, of.lr, of.seed) for of in args[:2]] == [(7, [1e-3], 1), (7, [2e-3], 1)]  # whichever
    assert [(of.max_update, of.seed) for of in args[2:]] == [(1000, 4), (1000, 5)]
    (only,) = trainings("table1", "--lrs", "1e-3", "--models", "dense").values()
    assert parse(only).lr == [1e-3] and not searched("table1", "--lrs", "1e-3")

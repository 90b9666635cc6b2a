"""English and multilingual language modelling: recipes, the papers' tables and our own studies."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..analysis.reports.claims import Claim
from ..analysis.reports.tables import LOWER_IS_BETTER, PaperTable
from ..common.errors import UserError
from .models import BUDGETS, EXPERTS, SLOWER
from .spec import Experiment, Recipe, Scale, Stage

P1 = "Multi-Head Mixture-of-Experts, arXiv 2404.15045"
SEEDS = (1, 2, 3)  # at CPU scale of whatever a table claims
# What the trainings of all experiments have in common.
COMMON = """
    --moe-gate-loss-wt 0.01 --optimizer mhmoe_adam --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.01
    --dropout 0.1 --required-batch-size-multiple 1 --num-workers 0 --keep-interval-updates 1 --no-epoch-checkpoints
    --log-format json
"""

_PAPER = Scale(250_000, 256, "--tokens-per-sample 4096 --lr 5e-4", batch=4, validations=50)
# What a few minutes suffice for: the demo and the plain scripts in examples/english_lm.
QUICK = Recipe(
    name="",
    family="lm",
    flags=f"""
        --task mhmoe_language_modeling --sample-break-mode none {COMMON}
        --criterion moe_cross_entropy --lr-scheduler polynomial_decay
    """,
    scales={"cpu": Scale(300, 16, "--tokens-per-sample 128 --lr 8e-3"), "paper": _PAPER},
    data="data/web-bible",
    prepare="english --source web-bible --vocab-size 4000",
)
DEMO = QUICK.variant("--mhmoe-precision auto", QUICK.scales).at_cpu(updates=240)
# The tables' own: 4.1 million tokens of text from several domains, the learning rate searched for every model. Like the
# demo they compute in what is fast on the machine: bf16 costs nothing that shows (docs/benchmarks, 2026-11-29).
ENGLISH = QUICK.variant("", QUICK.scales, data="data/mix", prepare="english --source mix").at_cpu(
    updates=1000, samples=32, validations=8, flags="--tokens-per-sample 128 --lr 4e-3 --mhmoe-precision auto",
    seeds=SEEDS, lrs=("4e-3", "8e-3", "1.6e-2"), search_updates=200,
)  # fmt: skip
# One setting is changed at a time, so the learning rate is one for all: what the search chose for each of the study's.
CAUSES = ENGLISH.variant("", ENGLISH.scales, name="causes").at_cpu(
    flags=f"{ENGLISH.scales['cpu'].flags} --lr 8e-3", lrs=(), seeds=(1,)
)
# The study's settings for shorter and longer trainings, at CPU scale of 0.6, 2.5 and 10 million tokens.
LENGTHS = tuple(
    CAUSES.variant(
        "",
        {name: replace(scale, updates=scale.updates * percent // 100) for name, scale in CAUSES.scales.items()},
        name=f"length-{percent}",
    )
    for percent in (15, 60, 250)
)
# Ten million tokens, twice as wide: with two heads a sub-token has 128 dimensions. Of rates that the search does not
# tell apart a long training bears the smaller one better (docs/benchmarks/2026-12-01-lr-factors.md).
WIDE = ENGLISH.variant("", ENGLISH.scales, name="wide").at_cpu(
    updates=2500, flags=f"{ENGLISH.scales['cpu'].flags} --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024",
    search_margin=0.03,
)  # fmt: skip
OFFICIAL = QUICK.variant(
    name="official",
    flags='--moe-gate-loss-combine-method sum --adam-betas "(0.9, 0.95)" --clip-norm 2.0 --weight-decay 0.1',
    scales={
        "cpu": Scale(300, 16, "--tokens-per-sample 128 --lr 8e-3 --decoder-ffn-embed-dim 344 --moe-ffn-dim 344"),
        "paper": Scale(
            100_000, 512, warmup=375, batch=4, validations=20,
            flags="""
                --tokens-per-sample 2048 --lr 6e-4 --end-learning-rate 3e-5
                --decoder-ffn-embed-dim 2048 --moe-ffn-dim 2048
            """,
        ),
    },
)  # fmt: skip
MULTILINGUAL = QUICK.variant(
    flags="--task mhmoe_multilingual_language_modeling --multilang-sampling-alpha 0.5",
    scales={
        # Validated twice: 14 languages take as long as a third of the training.
        "cpu": Scale(300, 16, "--tokens-per-sample 128 --lr 8e-3", validations=2, seeds=SEEDS),
        "paper": _PAPER,
    },
    data="data/multilingual",
    prepare="multilingual",
)
MULTILINGUAL_STUDY = MULTILINGUAL.variant("", MULTILINGUAL.scales, name="study").at_cpu(updates=200, validations=1)


def _validation_split(data: Path) -> str:
    """The training language's validation split chooses the checkpoint: the others' would be no zero-shot transfer."""
    trained = sorted(path.stem.removeprefix("train_") for path in (data / "label").glob("train_*.idx"))
    if not trained:
        return "--valid-subset valid_en"  # not prepared yet
    if not (data / "label" / f"valid_{trained[0]}.idx").is_file():
        raise UserError(f"--data ({data}) has no validation split of the language of train_{trained[0]}")
    return f"--valid-subset valid_{trained[0]}"


CLASSIFICATION = Recipe(
    name="classification",
    family="lm",
    flags=f"""
        --task mhmoe_sentence_classification {COMMON} --criterion mhmoe_sentence_classification
        --lr-scheduler polynomial_decay --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric
    """,
    scales={
        "cpu": Scale(300, 16, "--tokens-per-sample 128 --lr 1e-3", validations=2, seeds=SEEDS),
        "paper": Scale(10_000, 256, "--tokens-per-sample 256 --lr 2e-5", batch=4, validations=50),
    },
    data="data/nli",
    start={"cpu": MULTILINGUAL, "paper": MULTILINGUAL},
    data_flags=_validation_split,
)
THREE = ("dense", "xmoe", "mhmoe-params")  # 8 experts; the paper's table 1 has 32 too
FIVE = (*THREE, "xmoe-e32", "mhmoe-params-e32")
FIGURE_6 = tuple(f"{model}{suffix}" for suffix in ("", *(f"-e{of}" for of in EXPERTS)) for model in THREE[1:])
ENGLISH_STAGE, MULTILINGUAL_STAGE = (Stage(ENGLISH),), (Stage(MULTILINGUAL),)
NO_PAPER = PaperTable("none", "perplexity")  # of models that nobody has published side by side
OTHER_CORPUS = "another corpus, vocabulary and size of model: not to be compared with ours."


def perplexities(title: str, models: str, *values: float, of: str = P1) -> PaperTable:
    """Returns a table with one perplexity for each model."""
    note = f"Validation perplexity of {OTHER_CORPUS}"
    return PaperTable(f"{of}, {title}", "perplexity", dict(zip(models.split(), values, strict=True)), note)


def claims(
    paper: PaperTable, *pairs: str, column: str = "", at: str = "", on: str = "", **of_claim: Any
) -> tuple[Claim, ...]:
    """Returns a claim for each ``better < worse`` (two models), with the paper's own difference.

    Args:
        paper: the table that says so; of models that it has not, nothing is said of the paper.
        column: the paper's, of a table that has several.
        at: words behind the paper's difference, such as when it was measured.
        on: what is measured, where a table measures the same of several things.
        of_claim: metric, part, ... of every claim.
    """
    found = []
    for better, worse in (pair.split(" < ") for pair in pairs):
        values = [paper.value(name, column) for name in (better, worse) if name in paper.values]
        metric, of_paper = of_claim.get("metric", paper.metric), ""
        if len(values) == 2:
            of_percent = f"{values[0] - values[1]:+.1f} points"
            is_share = bool({"accuracy", "active experts"} & {paper.metric, metric})
            of_paper = (of_percent if is_share else f"{100 * (values[0] / values[1] - 1):+.1f} %") + at
        of_what = f"share of {metric}" if metric == "active experts" else of_claim.get("part") or metric
        of_what, measured = (f"{of_what} on {on}", {"what": on}) if on else (of_what, {})
        text = f"{better} has a {'lower' if metric in LOWER_IS_BETTER else 'higher'} {of_what} than {worse}"
        found.append(Claim(text, better, worse, of_paper, **{"metric": metric, **measured, **of_claim}))
    return tuple(found)


def table_1(title: str, *values: float) -> PaperTable:
    """Returns a block of the paper's table 1 from its five numbers: dense, then with 8 and with 32 experts."""
    return perplexities(f"table 1, {title}", " ".join(FIVE), *values)


TABLE_1 = table_1("English", 16.23, 14.82, 12.72, 11.96, 10.28)
TABLE_1_MULTILINGUAL = table_1("multilingual", 8.56, 7.19, 6.26, 6.02, 5.09)
TABLE_5 = perplexities(
    "table 5: number of heads",
    "xmoe mhmoe-params-h2 mhmoe-params mhmoe-params-h6 mhmoe-params-h8 mhmoe-params-h12",
    *(14.82, 12.87, 12.72, 12.41, 12.95, 13.28),
)
TABLE_6 = perplexities(
    "table 6: components",
    "dense dense-projections xmoe xmoe-projections mhmoe-params-no-splitting mhmoe-params-no-projections mhmoe-params",
    *(16.23, 16.40, 14.82, 14.77, 14.77, 13.97, 12.72),
)
_TABLE_7_COLUMNS = ("perplexity", "RTE", "PIQA", "Winogrande")
_TABLE_7_ROWS = {
    "mhmoe-params-no-projections": (13.97, 52.9, 68.2, 51.7),
    "mhmoe-params": (12.72, 53.4, 69.3, 53.8),
    "mhmoe-params-projections-2": (12.66, 54.0, 68.8, 53.3),
    "mhmoe-params-projections-3": (12.87, 53.1, 68.8, 52.7),
}
TABLE_7 = PaperTable(
    f"{P1}, table 7: layers in each projection",
    "perplexity",
    {model: dict(zip(_TABLE_7_COLUMNS, row)) for model, row in _TABLE_7_ROWS.items()},
    f"Validation perplexity, and accuracy of three tasks in percent, of {OTHER_CORPUS}",
    {task: f"{task} acc" for task in _TABLE_7_COLUMNS[1:]},
)
_COLUMNS = (
    "ARC-C acc", "ARC-C acc_norm", "ARC-E acc", "ARC-E acc_norm", "RTE acc", "OpenBookQA acc", "OpenBookQA acc_norm",
    "Winogrande acc", "PIQA acc", "BoolQ acc", "HellaSwag acc", "HellaSwag acc_norm", "TruthfulQA mc1",
    "TruthfulQA mc2",
)  # fmt: skip
_ENGLISH_TASKS = {
    "dense": (18.1, 23.3, 44.9, 39.7, 51.5, 17.1, 29.0, 48.2, 66.6, 55.0, 29.7, 34.1, 24.1, 39.3, 37.2),
    "xmoe": (19.0, 24.7, 48.3, 42.0, 52.7, 17.4, 29.8, 50.3, 67.9, 58.4, 31.4, 35.7, 24.3, 40.2, 38.7),
    "mhmoe-params": (19.6, 25.2, 50.2, 42.2, 53.0, 18.2, 30.3, 51.1, 68.7, 59.6, 33.2, 40.3, 24.7, 40.9, 39.8),
    "xmoe-e32": (19.4, 24.8, 50.4, 42.5, 52.7, 17.8, 30.0, 51.3, 68.8, 52.8, 33.4, 40.1, 24.3, 39.1, 39.1),
    "mhmoe-params-e32": (21.4, 26.8, 50.6, 44.8, 53.4, 18.8, 31.6, 53.8, 69.3, 56.6, 35.0, 42.1, 24.8, 39.5, 40.6),
}
_EIGHT = "mean of 12 scores"  # our records' name of it
TABLE_2 = PaperTable(
    f"{P1}, table 2: zero-shot English tasks",
    "accuracy",
    {
        # The paper's avg is the mean of its 14 scores; the mean without TruthfulQA is computed from them.
        model: {**dict(zip((*_COLUMNS, "avg"), row, strict=True)), _EIGHT: round(sum(row[:12]) / 12, 1)}
        for model, row in _ENGLISH_TASKS.items()
    },
    "In percent, of other models on other training data; avg: the paper's mean of all 14 scores of nine tasks, beside "
    f"which ours stands only with TruthfulQA; {_EIGHT}: of the eight others, computed here from the paper's scores.",
    {"avg": "mean of 14 scores"},
)
FIGURE_6_TABLE = PaperTable(
    f"{P1}, tables 1 and 2, at 8 and 32 experts",
    "perplexity",
    {model: {"perplexity": TABLE_1.value(model), _EIGHT: TABLE_2.value(model, _EIGHT)} for model in FIVE[1:]},
    f"Figure 6 itself is drawn without numbers; of {OTHER_CORPUS}",
)
_LANGUAGES = ("bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh", "avg")
_XNLI = {
    "dense": (33.1, 33.3, 33.0, 35.1, 32.8, 34.4, 33.6, 34.2, 33.3, 33.1, 33.3, 33.9, 33.5, 32.9, 33.5),
    "xmoe": (33.9, 33.4, 33.4, 37.3, 33.3, 35.9, 34.5, 35.0, 33.5, 33.6, 33.4, 34.2, 33.3, 33.2, 34.1),
    "mhmoe-params": (34.4, 33.2, 33.9, 40.1, 34.0, 36.4, 34.6, 35.2, 33.8, 34.4, 33.3, 34.7, 34.6, 33.5, 34.7),
    "xmoe-e32": (34.5, 34.5, 33.4, 39.6, 33.1, 35.3, 34.1, 35.4, 33.6, 34.7, 33.7, 33.6, 34.5, 33.3, 34.5),
    "mhmoe-params-e32": (35.8, 35.6, 34.1, 40.7, 33.9, 36.7, 34.4, 36.3, 34.3, 36.0, 34.1, 34.3, 35.2, 33.6, 35.3),
}
TABLE_3 = PaperTable(
    f"{P1}, table 3: zero-shot XNLI",
    "accuracy",
    {model: dict(zip(_LANGUAGES, row)) for model, row in _XNLI.items()},
    "In percent; avg: mean of the 14 languages; other models on other training data.",
)


ACTIVE = PaperTable(
    f"{P1}, figures 1 and 5: active experts",
    "active experts",
    {"xmoe-e32": 8.33, "mhmoe-params-e32": 90.71},
    "In percent, mean of 6 layers, by the paper's own threshold; other models on other training data.",
)
ENGLISH_TASKS = (
    "mhmoe zero-shot english --checkpoint {runs} --data {data} --tasks-dir data/zero-shot --out {out}/zero-shot"
)
XNLI = "mhmoe zero-shot xnli --checkpoint {runs} --data {data} --xnli-dir {xnli} --out {out}/xnli"
_QUESTIONS: dict[str, Any] = {
    "needs": ("zero-shot --dest data/zero-shot",), "measures": ("record-zero-shot-english.json",),
}  # fmt: skip
_ZERO_SHOT = {**_QUESTIONS, "after": (ENGLISH_TASKS,)}
_ZERO_SHOT_XNLI: dict[str, Any] = {"measures": ("record-zero-shot-xnli.json",), "after": (XNLI,)}
_ON_ENGLISH, _ON_XNLI = ({"what": "zero-shot", "split": split} for split in ("english", "xnli"))
_MORE_ACTIVE = "mhmoe-params-e32 < xmoe-e32"
POLYSEMY = Claim(
    "tokens of polysemous words go to more experts than those of like words with one sense",
    *2 * ("mhmoe-params-h8",), metric="experts per token", what="polysemy", part="polysemous", reference_part="control",
)  # fmt: skip
_WITH_PROJECTIONS = "mhmoe-params < mhmoe-params-no-projections"
_TABLE_1_CLAIMS = ("xmoe < dense", "mhmoe-params < xmoe", "mhmoe-params-e32 < xmoe-e32", "xmoe-e32 < xmoe")
# With top-k times the heads, as the second paper has it, beside X-MoE with as many experts of as many products.
P2_TOP_K = ("xmoe-g4", "mhmoe-flops-g4")
_P2_TOP_K_CLAIMS = claims(TABLE_1, "mhmoe-flops-g4 < xmoe", "mhmoe-flops-g4 < xmoe-g4", "mhmoe-flops-g4 < mhmoe-flops")
_DEEP = "mhmoe-params-projections-3"  # of table7
OF_STUDY = ("xmoe", "mhmoe-flops", *P2_TOP_K, "mhmoe-params", _DEEP)  # what single causes are changes of
_CAUSES = (
    "xmoe-g2", "mhmoe-flops-g2", *(f"mhmoe-flops-{cause}" for cause in (
        "h2", "gain", "subtoken-residual", "p1-router", "linear-router", "weak-balance",
    )),
    "mhmoe-params-g2", "mhmoe-params-g4",  # experts 30 and 15 times as wide as a sub-token, not 60
    "xmoe-p1", "mhmoe-params-p1",  # both layers as the first paper has them
    "mhmoe-params-no-splitting-projections-3", "mhmoe-flops-projections-3",  # is it splitting, or depth?
)  # fmt: skip
# Adam's step moves each weight as far; the more hidden units are added up, the further that moves what comes out.
_AS_FAST = ("xmoe", "mhmoe-flops", "mhmoe-params")
_SLOWER = (
    *(f"{model}{slower}" for model in _AS_FAST for slower in SLOWER),
    "xmoe-g4-slower-4", "mhmoe-params-no-projections-slower-16", "mhmoe-params-projections-3-slower-16",
)  # fmt: skip


def _by_width(*models: str) -> tuple[str, ...]:
    """These models, or pairs such as ``xmoe < dense``, whose experts learn by their width."""
    return tuple(re.sub(r"[\w-]+", r"\g<0>-by-width", names) for names in models)


_LIKE_P1 = perplexities("table 1, English", "xmoe-p1 mhmoe-params-p1", 14.82, 12.72)
_FIGURE_6_CLAIMS = ("mhmoe-params-e256 < xmoe-e256", "mhmoe-params-e256 < mhmoe-params-e64")
EXPERIMENTS = (
    Experiment("demo", "the three models on real text, MH-MoE under both budgets: 7 minutes on 2 cores", "demo",
        (Stage(DEMO),), (*THREE, "mhmoe-flops"), paper=TABLE_1),
    Experiment("table1", "perplexity, English, dense, X-MoE and MH-MoE", "english_lm",
        ENGLISH_STAGE, (*FIVE, "mhmoe-flops", *P2_TOP_K), paper_models=FIVE, paper=TABLE_1, reference="xmoe",
        source="P1 table 1", claims=claims(TABLE_1, *_TABLE_1_CLAIMS)),
    Experiment("table2", "zero-shot English tasks of the models of table1; needs the extra lm-eval", "english_lm",
        ENGLISH_STAGE, FIVE, **_ZERO_SHOT, paper=TABLE_2, reference="xmoe", source="P1 table 2",
        claims=claims(TABLE_2, *_TABLE_1_CLAIMS, column=_EIGHT, metric=_EIGHT, **_ON_ENGLISH)),
    Experiment("table5", "number of heads", "english_lm",
        ENGLISH_STAGE, ("xmoe", "mhmoe-params-h2", "mhmoe-params", "mhmoe-params-h8"),
        paper_models=tuple(TABLE_5.values), paper=TABLE_5, reference="xmoe", source="P1 table 5",
        claims=claims(TABLE_5, "mhmoe-params-h2 < xmoe", "mhmoe-params < xmoe", "mhmoe-params-h8 < xmoe",
            "mhmoe-params < mhmoe-params-h2", "mhmoe-params < mhmoe-params-h8", "mhmoe-params-h6 < mhmoe-params",
            "mhmoe-params-h6 < mhmoe-params-h8", "mhmoe-params-h6 < mhmoe-params-h12")),
    Experiment("table6", "what projections and splitting are worth", "english_lm",
        ENGLISH_STAGE, tuple(TABLE_6.values), paper=TABLE_6, reference="xmoe", source="P1 table 6",
        claims=claims(TABLE_6, "dense < dense-projections", "xmoe-projections < xmoe",
            "mhmoe-params-no-projections < xmoe", "mhmoe-params < mhmoe-params-no-projections",
            "mhmoe-params < mhmoe-params-no-splitting")),
    Experiment("table7", "0 to 3 layers in each projection, and three zero-shot tasks; needs the extra lm-eval",
        "english_lm", ENGLISH_STAGE, tuple(TABLE_7.values), **_QUESTIONS,
        after=(f"{ENGLISH_TASKS} --tasks {','.join(_TABLE_7_COLUMNS[1:]).lower()}",), paper=TABLE_7,
        source="P1 table 7",
        claims=(
            *claims(TABLE_7, _WITH_PROJECTIONS, "mhmoe-params-projections-2 < mhmoe-params",
                "mhmoe-params < mhmoe-params-projections-3", column="perplexity"),
            *(claim for task in _TABLE_7_COLUMNS[1:] for claim in claims(
                TABLE_7, _WITH_PROJECTIONS, column=task, metric="accuracy", part=f"{task} acc", **_ON_ENGLISH)),
        )),
    Experiment("table11", "numbers of parameters, counted beside the paper's; nothing is trained", "english_lm",
        after=("mhmoe plan --arch mhmoe_lm_base --experts 8 16 32 64 128 256",), source="P1 table 11"),
    Experiment("figure1", "which of 32 experts are active on table2's tasks, in each layer: a map; needs lm-eval",
        "english_lm", ENGLISH_STAGE, FIVE[3:], **_ZERO_SHOT, paper=ACTIVE, reference="xmoe-e32", source="P1 figure 1",
        claims=claims(ACTIVE, _MORE_ACTIVE, **_ON_ENGLISH)),
    Experiment("figure4", "figures 4 and 9: perplexity over a training, with 8 and 32 experts", "english_lm",
        ENGLISH_STAGE, FIVE, reference="xmoe", source="P1 figures 4, 9"),
    Experiment("figure6", "8 to 256 experts: perplexity and zero-shot English tasks; needs the extra lm-eval",
        "english_lm", ENGLISH_STAGE, FIGURE_6, **_ZERO_SHOT, paper=FIGURE_6_TABLE, source="P1 figure 6",
        claims=(*claims(FIGURE_6_TABLE, *_FIGURE_6_CLAIMS, column="perplexity"),
            *claims(FIGURE_6_TABLE, *_FIGURE_6_CLAIMS, column=_EIGHT, metric=_EIGHT, **_ON_ENGLISH))),
    Experiment("figure7", "experts per token of polysemous and like control words, 8 heads; by chance 7.2 of 8 experts",
        "english_lm", ENGLISH_STAGE, ("mhmoe-params-h8",), source="P1 figure 7", needs=("words --dest data/words",),
        after=("mhmoe analyze {runs} --data {data} --split test --polysemy data/words/words.json",),
        measures=("record-polysemy-test.json",), claims=(POLYSEMY,)),
    Experiment("official", "the official repository's recipe, its number of heads made explicit", "english_lm",
        (Stage(OFFICIAL),), ("official-h4",), source="official code"),
    Experiment("study", "the head-line study: both budgets, top-2 and paper 2's top-8 (g4), rates searched, 3 seeds",
        "english_lm", ENGLISH_STAGE,
        ("dense", "xmoe", "mhmoe-flops-h2", "mhmoe-flops", "mhmoe-params", *P2_TOP_K), paper=TABLE_1, reference="xmoe",
        claims=(*claims(TABLE_1, "xmoe < dense", "mhmoe-params < xmoe", "mhmoe-flops < xmoe",
            "mhmoe-flops-h2 < xmoe", "mhmoe-flops < dense", "mhmoe-flops-h2 < dense", "xmoe-g4 < xmoe"),
            *_P2_TOP_K_CLAIMS)),
    Experiment("causes", "what decides between MH-MoE and X-MoE: width and number of experts, projections, router",
        "english_lm",
        (Stage(ENGLISH, OF_STUDY), Stage(CAUSES, _CAUSES)), (*OF_STUDY, *_CAUSES), reference="xmoe",
        claims=(*claims(TABLE_1, "mhmoe-params-g4 < mhmoe-params", "mhmoe-params-g4 < xmoe-g4"),
            *claims(_LIKE_P1, "mhmoe-params-p1 < xmoe-p1", "mhmoe-params-p1 < mhmoe-params"),
            *claims(NO_PAPER, f"{_DEEP} < xmoe", f"{_DEEP} < mhmoe-params",
                f"{_DEEP} < mhmoe-params-no-splitting-projections-3", "mhmoe-flops-projections-3 < mhmoe-flops"))),
    Experiment("expert-rates", "what decides: the learning rate of the experts' second map, beside their width",
        "english_lm", (Stage(ENGLISH, (*_AS_FAST, "xmoe-g4")), Stage(CAUSES, _SLOWER)),
        (*_AS_FAST, "xmoe-g4", *_SLOWER), reference="xmoe",
        claims=claims(NO_PAPER, "mhmoe-params < xmoe", "xmoe-slower-4 < xmoe", "xmoe-slower-16 < xmoe",
            "mhmoe-flops-slower-4 < mhmoe-flops", "mhmoe-flops-slower-4 < xmoe-slower-4",
            *(f"mhmoe-params-slower-16 < {other}" for other in (
                "mhmoe-params", "xmoe", "xmoe-slower-4", "xmoe-slower-16",
            )))),
    Experiment("study-by-width", "the head-line study, experts' second map learning the slower the more inputs it has",
        "english_lm", ENGLISH_STAGE, _by_width(
            "dense", "xmoe", "mhmoe-flops-h2", "mhmoe-flops", "mhmoe-params-h2", "mhmoe-params", *P2_TOP_K,
            "mhmoe-params-g4",
        ), reference="xmoe-by-width",
        claims=claims(NO_PAPER, *_by_width(
            "xmoe < dense", "mhmoe-flops-h2 < xmoe", "mhmoe-flops < xmoe", "mhmoe-params-h2 < xmoe",
            "mhmoe-params < xmoe", "xmoe-g4 < xmoe", "mhmoe-flops-g4 < xmoe-g4", "mhmoe-params-g4 < xmoe-g4",
        ))),
    *(Experiment(recipe.name, f"what decides: {recipe.name.split('-')[1]} % of the study's updates", "english_lm",
        (Stage(recipe),), ("xmoe", "mhmoe-flops"), reference="xmoe") for recipe in LENGTHS),
    Experiment("study-wide", "study-by-width at twice the width, 10 million tokens a run", "english_lm",
        (Stage(WIDE),), _by_width("dense", "xmoe", "xmoe-e32", *(
            f"mhmoe-{budget}{heads}" for budget in BUDGETS for heads in ("-h2", "")
        )), reference="xmoe-by-width",
        claims=claims(NO_PAPER, *_by_width(
            "xmoe < dense", "xmoe-e32 < xmoe", "mhmoe-params < xmoe", "mhmoe-params-h2 < xmoe", "mhmoe-flops < xmoe",
            "mhmoe-flops-h2 < xmoe",
        ))),
    Experiment("table1-multilingual", "perplexity by language, dense, X-MoE and MH-MoE", "multilingual_lm",
        MULTILINGUAL_STAGE, FIVE, paper=TABLE_1_MULTILINGUAL, reference="xmoe", source="P1 table 1",
        claims=claims(TABLE_1_MULTILINGUAL, *_TABLE_1_CLAIMS)),
    Experiment("table3", "zero-shot XNLI of the models of table1-multilingual; needs --xnli and the extra lm-eval",
        "multilingual_lm", MULTILINGUAL_STAGE, FIVE,
        **_ZERO_SHOT_XNLI, paper=TABLE_3, source="P1 table 3",
        claims=claims(TABLE_3, *_TABLE_1_CLAIMS, column="avg", **_ON_XNLI)),
    Experiment("figure5", "which of 32 experts are active on XNLI, in each layer: a map; needs --xnli and lm-eval",
        "multilingual_lm", MULTILINGUAL_STAGE, FIVE[3:], **_ZERO_SHOT_XNLI, paper=ACTIVE, reference="xmoe-e32",
        source="P1 figure 5", claims=claims(ACTIVE, _MORE_ACTIVE, **_ON_XNLI)),
    Experiment("classification", "fine-tuned to classify in one language, tested in all; needs --data",
        "multilingual_lm", (Stage(CLASSIFICATION),), THREE),
    Experiment("study-multilingual", "14 languages, three seeds, a shorter training", "multilingual_lm",
        (Stage(MULTILINGUAL_STUDY),), THREE, paper=TABLE_1_MULTILINGUAL, reference="xmoe",
        claims=claims(TABLE_1_MULTILINGUAL, *_TABLE_1_CLAIMS[:2])),
)  # fmt: skip

"""Masked multimodal modelling and what is fine-tuned from it: recipes, the paper's tables and figure, our own study."""

from ..analysis.reports.tables import PaperTable
from .language_models import COMMON, FIVE, P1, SEEDS, THREE, claims, table_1
from .spec import Experiment, Recipe, Scale, Stage

# A sample is an image, a text and a pair of both. At paper scale images are decoded in processes of their own.
PRETRAINING = Recipe(
    name="",
    family="beit3",
    flags=f"""
        --task mhmoe_masked_multimodal --patch-size 16 {COMMON}
        --criterion mhmoe_masked_multimodal --lr-scheduler cosine --weight-decay 0.05
    """,
    scales={
        # Chosen on the validation part. All checkpoints stay, for figure 8.
        "cpu": Scale(600, 16, "--img-size 64 --max-text-length 32 --lr 2e-3 --keep-interval-updates -1", seeds=SEEDS),
        "paper": Scale(
            250_000, 512, "--img-size 224 --max-text-length 64 --lr 2.8e-3 --num-workers 8", batch=8, validations=50
        ),
    },
    data="data/image-text",
    prepare="image-text --image-size {--img-size} --patch-size {--patch-size}",
)

STUDY = PRETRAINING.variant("", PRETRAINING.scales, name="study").at_cpu(
    updates=400, lrs=("1e-3", "2e-3", "4e-3"), search_updates=150
)


def fine_tuning(task: str, metric: str, cpu: Scale, paper: Scale, cpu_start: Recipe = PRETRAINING) -> Recipe:
    """Returns the recipe of a task: its criterion is named like it, ``metric`` chooses the best checkpoint."""
    flags = f"""
        --task mhmoe_{task} --criterion mhmoe_{task}
        --best-checkpoint-metric {metric} --maximize-best-checkpoint-metric
    """
    scales, start = {"cpu": cpu, "paper": paper}, {"cpu": cpu_start, "paper": PRETRAINING}
    return PRETRAINING.variant(flags, scales, name=task, start=start, evaluate="--output {predictions}")


def _small(updates: int, lr: str, more: str = "", samples: int = 16) -> Scale:
    """Chosen on the validation part of the emoji with the dense model."""
    flags = f"--img-size 64 --max-text-length 32 --lr {lr} --dropout 0 {more}"
    return Scale(updates, samples, flags, validations=2, seeds=SEEDS)


def _base(updates: int, lr: str, more: str = "", samples: int = 256, side: int = 224, text: int = 64) -> Scale:
    """BEiT-3 base's, as far as its recipes tell (updates: its epochs on VQAv2, NLVR2, COCO, ImageNet)."""
    flags = f"--img-size {side} --max-text-length {text} --lr {lr} --num-workers 8 {more}"
    return Scale(updates, samples, flags, batch=8, validations=50)


# A body that learns as fast as the new head forgets the image before the head can read it: the head gets a higher rate.
VQA = fine_tuning(
    "vqa",
    "vqa_score",
    _small(800, "1.5e-4", "--head-lr-multiplier 20"),
    _base(50_000, "3e-5", "--weight-decay 0.01 --head-lr-multiplier 20 --randaug --drop-path-rate 0.1", 128, side=480),
)
# Statements need the kinds of images that questions teach: in a short training they start from the model's vqa run.
NLVR2 = fine_tuning(
    "nlvr2",
    "accuracy",
    _small(600, "1e-4", "--head-lr-multiplier 10 --center-features", samples=32),
    _base(6_700, "7e-4", "--weight-decay 0.2 --layer-decay 0.65 --drop-path-rate 0.2"),
    cpu_start=VQA,
)
CAPTIONING = fine_tuning("captioning", "cider", _small(300, "1e-3"), _base(22_000, "4e-5", side=480, text=32))
IMAGE_CLASSIFICATION = fine_tuning(
    "image_classification",
    "accuracy",
    _small(300, "1e-3"),
    _base(62_500, "7e-4", "--layer-decay 0.65 --imagenet-views", 1024),
)
# Of retrieval no recipe is known to us: the values at paper scale are our guess.
RETRIEVAL = fine_tuning("retrieval", "mean_recall", _small(300, "1e-3"), _base(22_000, "4e-5"))

TABLE_1 = table_1("masked multimodal", 17.95, 16.34, 14.73, 12.68, 10.87)
_TABLE_4_COLUMNS = (
    "VQAv2 test-dev", "VQAv2 test-std", "NLVR2 dev", "NLVR2 test-P", "COCO BLEU-4", "METEOR", "CIDEr", "SPICE"
)  # fmt: skip
_TABLE_4_ROWS = {
    "dense": (65.9, 66.0, 73.8, 74.2, 35.9, 29.3, 120.5, 19.6),
    "xmoe": (68.4, 69.7, 75.5, 76.1, 38.1, 30.2, 122.9, 21.3),
    "mhmoe-params": (70.1, 71.4, 77.0, 77.8, 39.7, 33.1, 124.1, 23.0),
}
TABLE_4 = PaperTable(
    f"{P1}, table 4, 8 experts",
    "score",
    {model: dict(zip(_TABLE_4_COLUMNS, row)) for model, row in _TABLE_4_ROWS.items()},
    "In percent, and scores times 100; VQAv2, NLVR2 and COCO: other data than ours unless you prepared them.",
    dict(zip(_TABLE_4_COLUMNS, ("valid questions", "test questions", "valid statements", "test statements", "BLEU-4"))),
)
_FOLDER = "masked_multimodal"


def _fine_tuned(recipe: Recipe, of: str) -> Experiment:
    return Experiment(recipe.name.replace("_", "-"), f"fine-tuned {of}", _FOLDER, (Stage(recipe),), THREE)


EXPERIMENTS = (
    Experiment("table1-multimodal", "perplexity of masked patches and words, dense, X-MoE and MH-MoE", _FOLDER,
        (Stage(PRETRAINING),), FIVE, paper=TABLE_1, reference="xmoe", source="P1 table 1",
        claims=claims(TABLE_1, "xmoe < dense", "mhmoe-params < xmoe", "mhmoe-params-e32 < xmoe-e32")),
    Experiment("table4", "fine-tuned on questions, statements and captions", _FOLDER,
        # Captions are the slowest to score.
        (Stage(VQA), Stage(NLVR2), Stage(CAPTIONING, ("dense", "mhmoe-*"))), THREE, paper=TABLE_4, source="P1 table 4",
        claims=(
            *claims(TABLE_4, "mhmoe-params < xmoe", column="VQAv2 test-std", on="questions", metric="accuracy"),
            *claims(TABLE_4, "mhmoe-params < xmoe", column="NLVR2 test-P", on="statements", metric="accuracy"),
            *claims(TABLE_4, "mhmoe-params < dense", column="CIDEr", on="captions", metric="CIDEr"),
        )),
    Experiment("figure8", "figures 8 and 10: to how many experts each patch's sub-tokens go, over a training", _FOLDER,
        (Stage(PRETRAINING, ("mhmoe-*",)),), ("mhmoe-params",), paper_models=("mhmoe-params-kept",), seeds=(1,),
        after=("mhmoe analyze --diversity {checkpoints} --data {data} --images 8 --out {out}/figure8",),
        measures=("figure8/diversity.json",),
        source="P1 figures 8, 10"),
    Experiment("multimodal", "everything: tables 1 and 4, figure 8; at CPU scale MH-MoE has X-MoE's FLOPs, too",
        _FOLDER, models=("dense", "xmoe", "mhmoe-flops"), parts=("table1-multimodal", "table4", "figure8")),
    _fine_tuned(VQA, "to answer questions about images"),
    _fine_tuned(NLVR2, "to judge statements about two images"),
    _fine_tuned(CAPTIONING, "to write captions"),
    _fine_tuned(IMAGE_CLASSIFICATION, "to name the class of an image"),
    _fine_tuned(RETRIEVAL, "to find images by texts and texts by images"),
    Experiment("study-multimodal", "images and text, learning rates searched, three seeds, a shorter training",
        _FOLDER, (Stage(STUDY),), THREE, paper=TABLE_1, reference="xmoe",
        claims=claims(TABLE_1, "xmoe < dense", "mhmoe-params < xmoe")),
)  # fmt: skip

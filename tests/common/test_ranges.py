"""Every number of every configuration is refused by name where it is not finite or out of range."""

import dataclasses
import importlib
import math
import pkgutil
import typing
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from beit3_models import IMAGES
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass, configs
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, setup_task
from fairseq_arguments import parse_words

from mhmoe_fairseq.common.ranges import FLAGS, Range, check_flag, flag
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.flags import decoder_settings, encoder_settings
from mhmoe_fairseq.models.options import BEiT3Options, LanguageModelOptions
from mhmoe_fairseq.moe import MHMoEConfig
from mhmoe_fairseq.training.checks import check_training_numbers

NEVER = (math.nan, math.inf, -math.inf, 1e300)
SCHEDULERS = ("cosine", "fixed", "inverse_sqrt", "polynomial_decay", "triangular")
MAY_BE_NEGATIVE = {
    "moe_eval_capacity_token_fraction", "eval_capacity_fraction", "output_dictionary_size", "stop_min_lr", "min_lr",
    "warmup_init_lr", "lr_period_updates",
}  # fmt: skip
MAY_BE_ZERO = MAY_BE_NEGATIVE | {
    "activation_dropout", "adam_betas", "adam_eps", "attention_dropout", "caption_length_penalty", "clip_norm",
    "data_buffer_size", "drop_path_rate", "drop_worst_after", "drop_worst_ratio", "dropout", "ema_decay",
    "end_learning_rate", "force_anneal", "label_smoothing", "lr", "lr_shrink", "max_epoch", "max_lr", "max_update",
    "mhmoe_head_dropout", "mhmoe_projection_layers", "mhmoe_shared_expert_dim", "mhmoe_shared_experts",
    "mhmoe_z_loss_wt", "moe_freq", "moe_gate_loss_wt", "multilang_sampling_alpha", "num_projection_layers", "power",
    "second_lr", "second_weight_decay", "seed", "sentencepiece_alpha", "shared_expert_dim", "stop_time_hours",
    "total_num_update", "warmup_updates", "weight_decay",
}  # fmt: skip
NOT_ONE = {"caption_max_len", "max_text_length", "num_classes"} | {
    name for name in FLAGS if name.endswith(("dropout", "_prob", "_ratio", "_smoothing", "drop_path_rate"))
}  # fmt: skip


def numeric_fields(configuration: type) -> list[str]:
    """Names of the fields that hold numbers, one, several or none."""
    return [f.name for f in dataclasses.fields(configuration) if {int, float} & set(flat(f.type))]


def flat(kind: object) -> Iterator[object]:
    """A type and all that its brackets name."""
    kind = {"int": int, "float": float, "float | None": float}.get(kind, kind) if isinstance(kind, str) else kind
    yield kind
    for argument in typing.get_args(kind):
        yield from flat(argument)


def own_configurations() -> list[type]:
    for group in ("models", "criterions", "tasks", "training"):
        package = importlib.import_module(f"mhmoe_fairseq.{group}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

    def below(kind: type) -> Iterator[type]:
        for sub in kind.__subclasses__():
            yield sub
            yield from below(sub)

    return sorted({c for c in below(FairseqDataclass) if c.__module__.startswith("mhmoe_fairseq")}, key=str)


def bad_values(name: str) -> list[object]:
    """Numbers that ``name`` may not have, stated here once more."""
    allowed = {-1: MAY_BE_NEGATIVE, 0: MAY_BE_ZERO}
    values = [*NEVER, *(value for value, names in allowed.items() if name not in names)]
    return [*values, 1] if name in NOT_ONE else values


def assert_refused(name: str, build: typing.Callable[[object], object], shown: str | None = None) -> None:
    for value in bad_values(name):
        with pytest.raises(ValueError) as caught:
            build(value)
        message = str(caught.value)
        assert message.startswith(f"{shown or flag(name)} ("), (name, value, message)
        assert str(value) in message and " must be " in message and "\n" not in message, message


# ---------------------------------------------------------------------- the table is complete


@pytest.mark.parametrize("configuration", own_configurations(), ids=lambda kind: kind.__name__)
def test_every_number_of_ours_has_a_range(configuration: type) -> None:
    missing = [name for name in numeric_fields(configuration) if name not in FLAGS]
    assert not missing, f"{configuration.__name__}: give {missing} a range in mhmoe_fairseq/common/ranges.py"


def test_every_number_of_fairseqs_groups_has_a_range() -> None:
    schedulers = [LR_SCHEDULER_DATACLASS_REGISTRY[name] for name in SCHEDULERS]
    groups = [configs.OptimizationConfig, OPTIMIZER_DATACLASS_REGISTRY["mhmoe_adam"], *schedulers]
    missing = {name for group in groups for name in numeric_fields(group) if name not in FLAGS}
    assert not missing
    assert {"lr", "clip_norm", "adam_eps", "weight_decay", "warmup_updates", "update_freq"} <= FLAGS.keys()


def test_a_new_number_without_a_range_is_noticed() -> None:
    fields = [("width", typing.Optional[int]), ("rates", typing.List[float]), ("name", typing.Optional[str])]
    assert numeric_fields(dataclasses.make_dataclass("New", fields)) == ["width", "rates"]


# ---------------------------------------------------------------------- every entry asks it


LAYER = {name for name, kind in typing.get_type_hints(MHMoEConfig).items() if {int, float} & set(flat(kind))}


@pytest.mark.parametrize("name", sorted(LAYER))
def test_the_layers_configuration(name: str) -> None:
    base = {"embed_dim": 8, "num_experts": 4, "expert_ffn_dim": 8}
    assert_refused(name, lambda value: MHMoEConfig(**{**base, name: value}), name)


@pytest.mark.parametrize("multiple", [0, -1, math.nan, 1.5])
@pytest.mark.parametrize("name", ["multiple_of", "expert_multiple"])
def test_the_multiples_of_a_budget(name: str, multiple: float) -> None:
    reference = MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=8)
    with pytest.raises(ValueError, match=rf"{name} \({multiple}\) must be"):
        MHMoEConfig.matching(reference, budget="flops", num_heads=2, **{name: multiple})


@pytest.mark.parametrize("arch, flags", [("mhmoe_lm_tiny", {"mhmoe_routing": "capacity"}), ("dense_lm_tiny", {})])
def test_the_options_of_language_models(arch: str, flags: dict) -> None:
    options = architecture_options(arch, **flags)
    for name in numeric_fields(LanguageModelOptions):

        def build(value: object, name: str = name) -> object:
            return decoder_settings(Namespace(**{**vars(options), name: value}), 50)

        assert_refused(name, build)


@pytest.mark.parametrize("name", numeric_fields(BEiT3Options))
def test_the_options_of_beit3(name: str) -> None:
    options = architecture_options("xmoe_beit3_tiny", **IMAGES)
    assert_refused(name, lambda value: encoder_settings(Namespace(**{**vars(options), name: value}), 50))


OWN_TASKS = sorted(name for name in TASK_REGISTRY if name.startswith("mhmoe_"))


@pytest.mark.parametrize("task", OWN_TASKS)
def test_the_options_of_tasks(task: str) -> None:
    default = TASK_DATACLASS_REGISTRY[task]()
    for name in numeric_fields(type(default)):

        def build(value: object, name: str = name) -> object:
            return TASK_REGISTRY[task].setup_task(Namespace(**{**vars(default), "tpu": False, name: value}))

        assert_refused(name, build)


OWN_CRITERIONS = sorted(name for name, kind in CRITERION_REGISTRY.items() if kind.__module__.startswith("mhmoe"))


@pytest.mark.parametrize("criterion", OWN_CRITERIONS)
def test_the_options_of_criterions(criterion: str) -> None:
    default = CRITERION_DATACLASS_REGISTRY[criterion]()
    task = SimpleNamespace(target_dictionary=None, source_dictionary=None)
    names = numeric_fields(type(default))
    assert "moe_gate_loss_wt" in names
    for name in names:

        def build(value: object, name: str = name) -> object:
            return CRITERION_REGISTRY[criterion].build_criterion(Namespace(**{**vars(default), name: value}), task)

        assert_refused(name, build)


@pytest.mark.parametrize("name", ["lr", "clip_norm", "adam_betas", "adam_eps", "weight_decay", "update_freq", "power"])
def test_fairseqs_own_numbers(name: str) -> None:
    for group in ("optimization_config", "optimizer_config", "lr_scheduler_config"):

        def build(value: object, group: str = group) -> None:
            check_training_numbers(Namespace(**{group: Namespace(**{name: value})}))

        assert_refused(name, build)
        listed = Namespace(**{group: Namespace(**{name: [0.5, math.nan]})})
        with pytest.raises(ValueError, match=rf"^{flag(name)} \(\[0.5, nan\]\) must be"):
            check_training_numbers(listed)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr", "1e400"], r"^--lr \(\[inf\]\) must be at least 0"),
        (["--clip-norm", "nan"], r"^--clip-norm \(nan\) must be at least 0"),
        (["--adam-betas", "(0.9, 1.5)"], r"^--adam-betas \(\(0.9, 1.5\)\) must be in \[0, 1\)"),
        (["--weight-decay", "inf"], r"^--weight-decay \(inf\) must be"),
        (["--lr-scheduler", "polynomial_decay", "--total-num-update", "9", "--power", "nan"], r"^--power \(nan\)"),
        (["--moe-gate-loss-wt", "nan"], r"^--moe-gate-loss-wt \(nan\) must be at least 0"),
        (["--mhmoe-capacity-factor", "nan"], r"^--mhmoe-capacity-factor \(nan\) must be positive"),
        (["--tokens-per-sample", "0"], r"^--tokens-per-sample \(0\) must be at least 1"),
    ],
)
def test_a_training_is_refused_before_it_starts(words: list[str], message: str, tmp_path) -> None:
    """With fairseq's own configuration, from the command line to the task and the model."""
    (tmp_path / "dict.txt").write_text("a 1\nb 1\n", encoding="utf-8")
    command = ["fairseq-train", str(tmp_path), "--task", "mhmoe_language_modeling", "--arch", "mhmoe_lm_tiny"]
    command += ["--mhmoe-routing", "capacity", "--criterion", "moe_cross_entropy", "--optimizer", "mhmoe_adam"]
    command += ["--save-dir", str(tmp_path / "run"), "--max-update", "1", *words]
    cfg = convert_namespace_to_omegaconf(parse_words(command))
    with pytest.raises(ValueError, match=message):
        setup_task(cfg.task).build_model(cfg.model)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    "allowed, value, problem",
    [
        (Range(low=1, integer=True), 2**31, "must be at least 1, an integer below 2**31"),
        (Range(low=1, integer=True), 1.5, "must be at least 1, an integer below 2**31"),
        (Range(low=1, integer=True), 0, "must be at least 1, an integer below 2**31"),
        (Range(low=0, high=1, open_low=True), 0.0, "must be in (0, 1]"),
        (Range(low=0, high=1, open_low=True), 1.0, None),
        (Range(low=0, open_low=True), 0.0, "must be positive and finite"),
        (Range(low=0), math.inf, "must be at least 0 and finite"),
        (Range(low=0), 0, None),
        (Range(), "three", "must be a finite number"),
        (Range(low=0), True, "must be at least 0 and finite"),
        (Range(), math.nan, "must be a finite number"),
        (Range(), 1e39, "must be a finite number"),
    ],
)
def test_rules(allowed: Range, value: float, problem: str | None) -> None:
    assert allowed.problem(value) == problem


def test_what_is_not_given_is_no_problem() -> None:
    for value in (None, "${optimization.lr}", [], [0.1, 1e-4], "(0.9, 0.98)"):
        check_flag("lr", value)

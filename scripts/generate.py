#!/usr/bin/env python
"""Write what follows from experiments and kept results: hydra files of the demo, marked tables in the READMEs.

A table stands between ``<!-- settings NAME -->``, ``<!-- paper NAME -->``, ``<!-- experiments FOLDER -->`` or, of
``HEADLINES``, ``<!-- claims all -->``, and ``<!-- end -->``. ``--check`` writes nothing and ends with status 1 if a
file is not up to date.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mhmoe_fairseq.common.files import atomic_open
from mhmoe_fairseq.common.tables import MISSING, markdown_table
from mhmoe_fairseq.experiments import EXPERIMENTS
from mhmoe_fairseq.experiments.kept import TREE
from mhmoe_fairseq.experiments.plan import Plan
from mhmoe_fairseq.experiments.results import read_page
from mhmoe_fairseq.experiments.run import Choice
from mhmoe_fairseq.experiments.spec import Flags, parse_flags

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
_MARKED = re.compile(r"<!-- (settings|paper|experiments|claims) ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
# What README.md tells of RESULTS.md: the experiment, what is compared with what, and the claim about them.
HEADLINES = (
    ("table1", "X-MoE against dense", "xmoe < dense"),
    ("table1", "X-MoE with 32 experts against 8", "xmoe-e32 < xmoe"),
    ("table5", "MH-MoE `params` with 2 heads against X-MoE", "mhmoe-params-h2 < xmoe"),
    ("table5", "with 4 heads", "mhmoe-params < xmoe"),
    ("table5", "with 8 heads", "mhmoe-params-h8 < xmoe"),
    ("expert-rates", "with 4 heads, the second map of its experts at a sixteenth of the learning rate, against itself",
        "mhmoe-params-slower-16 < mhmoe-params"),
    ("expert-rates", "the same against X-MoE", "mhmoe-params-slower-16 < xmoe"),
    ("expert-rates", "the same against X-MoE at that rate, too", "mhmoe-params-slower-16 < xmoe-slower-16"),
    ("expert-rates", "X-MoE at that rate against itself", "xmoe-slower-16 < xmoe"),
    ("causes", "MH-MoE `params` with the first paper's router and sub-token residual, against X-MoE with its router",
        "mhmoe-params-p1 < xmoe-p1"),
    ("causes", "with experts a quarter as wide, four times as many and as many choices, against itself",
        "mhmoe-params-g4 < mhmoe-params"),
    ("causes", "the same against X-MoE made so, too", "mhmoe-params-g4 < xmoe-g4"),
    ("causes", "with 4 heads and projections of three layers, against itself with one",
        "mhmoe-params-projections-3 < mhmoe-params"),
    ("causes", "the same against X-MoE", "mhmoe-params-projections-3 < xmoe"),
    ("study", "MH-MoE `flops` with 4 heads against X-MoE", "mhmoe-flops < xmoe"),
    ("study", "with 2 heads", "mhmoe-flops-h2 < xmoe"),
    ("study", "with 4 heads against dense", "mhmoe-flops < dense"),
    ("study", "both with finer experts, as above", "mhmoe-flops-g4 < xmoe-g4"),
    ("p2-table1", "Second paper's networks: sparse against dense", "smoe-swiglu < dense-swiglu"),
    ("p2-table1", "fine-grained against sparse", "fine-grained < smoe-swiglu"),
    ("p2-table1", "MH-MoE with 2 heads against sparse", "mhmoe-swiglu-h2 < smoe-swiglu"),
    ("p2-table1", "with 3 heads", "mhmoe-swiglu-h3 < smoe-swiglu"),
    ("family", "DeepSeekMoE against plain top-2 gating", "deepseekmoe < smoe"),
    ("family", "OLMoE", "olmoe < smoe"),
    ("family", "ReMoE", "remoe < smoe"),
    ("family", "LatentMoE", "latentmoe < smoe"),
    ("family", "MH-MoE `flops` with a bank of experts for each head", "mhmoe-banks < smoe"),
    ("figure1", "Share of active experts, MH-MoE against X-MoE, 32 experts", "mhmoe-params-e32 < xmoe-e32"),
    ("table1-multilingual", "Fourteen languages: MH-MoE `params` against X-MoE", "mhmoe-params < xmoe"),
    ("table1-multimodal", "Images and text: the same", "mhmoe-params < xmoe"),
)  # fmt: skip
# The hydra group of each flag that is not the model's; a group's own flag names its choice.
_GROUPS = {
    "common": "cpu seed log_format log_interval",
    "task": "task tokens_per_sample sample_break_mode",
    "criterion": "criterion moe_gate_loss_wt",
    "dataset": "batch_size required_batch_size_multiple num_workers validate_interval_updates",
    "optimizer": "optimizer adam_betas adam_eps weight_decay",
    "lr_scheduler": "lr_scheduler warmup_updates total_num_update",
    "optimization": "max_update lr clip_norm update_freq",
    "checkpoint": "no_epoch_checkpoints save_interval_updates keep_interval_updates",
    "distributed_training": "distributed_world_size",
}
_LISTS = ("lr", "update_freq")
_HEAD = """# @package _group_
# Written by scripts/generate.py: the recipe of `mhmoe reproduce demo` for fairseq-hydra-train, with fairseq 0.12.2
# (Hydra 1.0) and with fairseq-fixed (Hydra 1.3). From the root of the checkout, after examples/english_lm/prepare.sh:
#
#   fairseq-hydra-train --config-dir examples/english_lm/hydra --config-name cpu model=mhmoe_params \\
#       common.user_dir="$(mhmoe user-dir)" task.data=data/web-bible checkpoint.save_dir=outputs/mhmoe
#
# model= is dense, xmoe, mhmoe_params or mhmoe_flops. A field that stands in no file is added with a plus:
# +model.decoder_layers=2. The plugin's own groups, such as criterion=moe_cross_entropy, do not exist before it is
# imported: set _name, as below.

hydra:
  run:
    dir: .  # stay in the working folder, so that paths may be relative

defaults:
  - model: mhmoe_params
"""


def training_flags(name: str, scale: str, model: str) -> Flags:
    """Returns the flags of an experiment's training in one process, without paths."""
    experiment = EXPERIMENTS[name]
    plan = Plan(experiment, Path("OUT"), Choice(scale), Path("DATA"))
    flags = parse_flags(plan.run(experiment.stages[0].recipe, model, 1).training(alone=True)[2:])
    return {flag: value for flag, value in flags.items() if flag not in ("--user-dir", "--save-dir", "--log-file")}


def hydra_files() -> Iterator[tuple[Path, str]]:
    """Yields path and text of each file of the demo."""
    folder = EXAMPLES / "english_lm" / "hydra"
    for model in EXPERIMENTS["demo"].models:
        flags = training_flags("demo", "cpu", model)
        fields = {flag[2:].replace("-", "_"): value for flag, value in flags.items()}
        text = _HEAD
        for group, names in _GROUPS.items():
            text += f"\n{group}:\n"
            for field in names.split():
                text += f"  {'_name' if field == group else field}: {_yaml(field, fields.pop(field))}\n"
            text += "  data: ???  # the folder that mhmoe prepare made\n" if group == "task" else ""
        yield folder / "cpu.yaml", text
        own = "".join(f"{'_name' if field == 'arch' else field}: {_yaml(field, fields[field])}\n" for field in fields)
        head = f"# @package _group_\n# Written by scripts/generate.py: {model} of `mhmoe reproduce demo`.\n"
        yield folder / "model" / f"{model.replace('-', '_')}.yaml", head + own


def _yaml(field: str, value: tuple[str, ...]) -> str:
    word = " ".join(value) or "true"
    word = repr(float(word)) if re.fullmatch(r"[\d.]+e-?\d+", word) else word
    return f"[{word}]" if field in _LISTS else word


def table(what: str, name: str) -> str:
    """Returns the table of a mark."""
    if what == "claims":
        return headlines()
    if what == "experiments":
        found = [experiment for experiment in EXPERIMENTS.values() if experiment.folder == name]
        return markdown_table(["`mhmoe reproduce`", "what"], [[f"`{of.name}`", of.summary] for of in found])
    if what == "paper":
        paper = EXPERIMENTS[name].paper
        rows = {model: of if isinstance(of, dict) else {paper.metric: of} for model, of in paper.values.items()}
        columns = list(next(iter(rows.values())))
        head = f"{paper.title}. {paper.note}\n\n"
        return head + markdown_table(
            ["model", *columns], [[model, *(str(row[column]) for column in columns)] for model, row in rows.items()]
        )
    model = next(
        model for model in ("mhmoe-params", "official-h4", "mhmoe-swiglu-h2") if model in EXPERIMENTS[name].models
    )
    cpu, paper = (training_flags(name, scale, model) for scale in ("cpu", "paper"))
    different = [flag for flag in {**cpu, **paper} if cpu.get(flag) != paper.get(flag)]
    cells = [[f"`{flag}`", *(_cell(flags.get(flag)) for flags in (cpu, paper))] for flag in different]
    same = " ".join(" ".join([flag, *value]) for flag, value in cpu.items() if flag not in different)
    return markdown_table([f"`{model}`", "`--scale cpu`", "`--scale paper`"], cells) + f"\n\nBoth: `{same}`"


def headlines() -> str:
    """Returns the table of ``HEADLINES``: what the kept results say of each."""
    pages = {name: read_page(EXPERIMENTS[name], ROOT / TREE) for name, *_ in HEADLINES}
    rows = []
    for name, compared, pair in HEADLINES:
        page = pages[name]
        judged = zip(page.experiment.claims, page.findings, strict=True)
        claim, finding = next(row for row in judged if f"{row[0].model} < {row[0].reference}" == pair)
        ours = finding.told if finding.changes else MISSING
        rows.append([compared, claim.paper or MISSING, ours, finding.verdict, f"[`{name}`]({page.file})"])
    return markdown_table(["compared", "paper", "ours", "better?", "experiment"], rows)


def _cell(value: tuple[str, ...] | None) -> str:
    return "" if value is None else " ".join(value) or "yes"


def texts() -> Iterator[tuple[Path, str]]:
    """Yields path and up-to-date text of every file that has something generated."""
    yield from hydra_files()
    for path in [ROOT / "README.md", *sorted(EXAMPLES.glob("*/README.md"))]:
        text = path.read_text(encoding="utf-8")
        yield (
            path,
            _MARKED.sub(lambda mark: f"<!-- {mark[1]} {mark[2]} -->\n{table(mark[1], mark[2])}\n<!-- end -->", text),
        )


def main() -> int:
    """Writes, or with ``--check`` names what is not up to date."""
    stale = {path: text for path, text in texts() if not path.is_file() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            with atomic_open(path) as stream:
                stream.write(text.encode())
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

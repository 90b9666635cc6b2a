"""``mhmoe checkpoint``: look into checkpoints, convert, average, pack, import and export them."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arguments import (
    add_action,
    existing_file,
    existing_folder,
    existing_path,
    output_file,
    output_folder,
    real,
    whole,
)
from ..common.console import say
from ..common.errors import UserError
from ..common.files import sha256_of, write_json
from ..common.tables import MISSING, byte_size, markdown_table

if TYPE_CHECKING:
    from ..checkpoints.summary import CheckpointSummary

_INSPECT = """\
Prints architecture, progress, experts, parameters by part, dtypes, sizes, optimizer state, the dictionary's
fingerprint and, where the data folder or its manifest is at hand, the hash of the corpus. Nothing in the file is run,
and tensors are mapped, not read: it takes seconds for a file of any size.

  mhmoe checkpoint inspect checkpoints/checkpoint_best.pt
"""
_CONVERT = """\
The suffixes say the direction: .pt (fairseq) or .safetensors. Everything goes over, bit by bit: weights,
configuration, optimizer state, data position, meters. What comes back opens in fairseq-eval-lm, and a training resumes
from it. --weights-only leaves the optimizer state out: a third of the size, and a training that starts from it has to
warm up Adam again (--finetune-from-model).

  mhmoe checkpoint convert checkpoints/checkpoint_best.pt model.safetensors --weights-only
  mhmoe checkpoint convert model.safetensors checkpoints/checkpoint_best.pt
"""
_AVERAGE = """\
Chooses as fairseq's average_checkpoints.py does. The checkpoints must be of one model: same architecture, same
dictionary. The result has no optimizer state: evaluate it or fine-tune from it.

  mhmoe checkpoint average --inputs checkpoints/checkpoint3.pt checkpoints/checkpoint4.pt --output mean.pt
  mhmoe checkpoint average --inputs checkpoints --num-epoch-checkpoints 5 --output mean.pt
  mhmoe checkpoint average --inputs checkpoints --num-update-checkpoints 5 --checkpoint-upper-bound 20000 \\
      --output mean.pt
"""
_PACK = """\
Of a model with --mhmoe-quantize: its weights of -1, 0 and 1 take two bits each, with a scale for every matrix, all
others stay as they are, and the optimizer state goes. What comes out evaluates and generates as before, to the last
bit, and cannot be trained. The suffix says the format: .pt, which every command opens, or .safetensors.

  mhmoe checkpoint pack checkpoints/checkpoint_best.pt packed.pt
  mhmoe checkpoint pack checkpoints/checkpoint_best.pt packed.safetensors
"""
_MIX = """\
Branch-Train-MiX: dense models, each trained on from the seed on a domain of its own, become one smoe_lm_* model of the
same size, with an expert of each branch's feed-forward network in every layer (or every n-th: --moe-freq); all else is
the branches' mean, tensor by tensor. Routers are new and random, and there is no optimizer state: train it on.
The same --branch several times is sparse upcycling. docs/domains.md has the whole recipe.

  mhmoe checkpoint mix --seed seed.pt --branch law.pt --branch code.pt --include-seed --output mixed.pt
"""
_OFFICIAL = """\
Of the official repository's training, whole or as its ranks wrote it: model.pt, which fairseq, mhmoe evaluate and
--finetune-from-model open, or with --layers-only the MoE layers by themselves. Nothing in the file is run.

  mhmoe checkpoint import-official checkpoint_best-rank-0.pt --out imported --data DATA
  mhmoe checkpoint import-official checkpoint_best.pt --out layers --layers-only --routing dropless
"""
_EXPORT = """\
hf: a folder that transformers 5.10 and later, lm-eval and vLLM open without this package: config.json, the model's
code, weights as safetensors, tokenizer, and a README.md with the checkpoint's records beside it. Of BEiT-3 the encoder
and the head of classes or questions, for transformers' pipelines. Dropless routing and ReMoE only. Details:
docs/export.md.
fairseq: such a folder of a language model, perhaps trained further, becomes model.pt and dict.txt again.

  mhmoe checkpoint export --format hf checkpoints/checkpoint_best.pt exported
  mhmoe checkpoint export --format fairseq exported back
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``mhmoe checkpoint inspect|convert|average|mix|pack|import-official|export``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    inspect = add_action(actions, "inspect", "say what a checkpoint holds", _INSPECT)
    inspect.add_argument("checkpoint", type=existing_file, nargs="+", metavar="FILE", help="a .pt or .safetensors file")
    inspect.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there, too")

    convert = add_action(actions, "convert", "turn a .pt into a .safetensors file or back", _CONVERT)
    convert.add_argument("source", type=existing_file, metavar="FROM", help="the file to read")
    convert.add_argument("target", type=output_file, metavar="TO", help="the file to write")
    convert.add_argument("--weights-only", action="store_true", help="leave the optimizer state out")

    mean = add_action(actions, "average", "average the weights of several checkpoints", _AVERAGE)
    mean.add_argument(
        "--inputs", type=existing_path, nargs="+", required=True, metavar="PATH", help="files, or one folder"
    )
    mean.add_argument("--num-epoch-checkpoints", type=whole(), metavar="N", help="the last N checkpointEPOCH.pt of it")
    mean.add_argument(
        "--num-update-checkpoints", type=whole(), metavar="N", help="the last N checkpoint_EPOCH_UPDATE.pt of it"
    )
    mean.add_argument(
        "--checkpoint-upper-bound", type=whole(at_least=0), metavar="M", help="none of a later epoch or update than M"
    )
    mean.add_argument("--output", type=output_file, required=True, metavar="FILE", help="a .pt or .safetensors file")
    pack = add_action(actions, "pack", "write 1.58-bit weights in two bits each, for evaluation", _PACK)
    pack.add_argument("source", type=existing_file, metavar="FROM", help="a .pt or .safetensors file")
    pack.add_argument("target", type=output_file, metavar="TO", help="a .pt or .safetensors file to write")
    mixed = _add_mix(actions)
    for writer in (convert, mean, mixed, pack):
        writer.add_argument("--overwrite", action="store_true", help="replace an existing file")

    official = add_action(actions, "import-official", "import a checkpoint of the official MH-MoE", _OFFICIAL)
    official.add_argument(
        "checkpoint", metavar="CKPT", type=existing_file,
        help="a whole checkpoint, or one of NAME-shared.pt, NAME-rank-0.pt, ...: all of them are then read",
    )  # fmt: skip
    official.add_argument(
        "--out", required=True, metavar="DIR", type=output_folder, help="folder for model.pt or moe_layers.pt"
    )
    official.add_argument(
        "--data", metavar="DIR", type=existing_folder,
        help="folder with the model's dict.txt (and vocabulary), copied beside model.pt",
    )  # fmt: skip
    official.add_argument(
        "--routing", choices=("capacity", "dropless"), default="capacity",
        help="capacity, what the model was trained with, or dropless, where results do not depend on the batch",
    )  # fmt: skip
    official.add_argument(
        "--layers-only", action="store_true",
        help="write only the MoE layers, for MHMoELayer in plain PyTorch: moe_layers.pt, {layer: {config, state}}",
    )  # fmt: skip
    official.add_argument("--overwrite", action="store_true", help="replace files of these names in --out")
    _add_export(actions)


def _add_mix(actions: Any) -> argparse.ArgumentParser:
    mixed = add_action(actions, "mix", "make one model with experts of several dense ones", _MIX)
    add = mixed.add_argument
    add("--seed", type=existing_file, required=True, metavar="FILE", help="what the branches were trained from")
    add(
        "--branch", type=existing_file, action="append", required=True, metavar="FILE",
        help="a dense model that becomes an expert; repeated, once for each",
    )  # fmt: skip
    add("--include-seed", action="store_true", help="make the seed an expert, too, behind the branches")
    add("--moe-freq", type=whole(), default=1, metavar="N", help="experts in every n-th layer, means elsewhere (1)")
    add("--moe-top-k", type=whole(), default=2, metavar="K", help="experts per token (2)")
    add("--router-seed", type=whole(at_least=0), default=1, metavar="N", help="of the routers' random values (1)")
    add("--output", type=output_file, required=True, metavar="FILE", help="a .pt or .safetensors file")
    return mixed


def _add_export(actions: Any) -> None:
    export = add_action(actions, "export", "make a folder for Hugging Face of a model, and back", _EXPORT)
    export.add_argument(
        "source", type=existing_path, metavar="FROM", help="a checkpoint; with fairseq a folder of hf's"
    )
    export.add_argument("out", type=output_folder, metavar="DIR", help="the folder to write, empty or not there")
    export.add_argument("--format", choices=("hf", "fairseq"), required=True, help="what to make")
    export.add_argument(
        "--data", metavar="DIR", type=existing_folder,
        help="hf: folder with dict.txt and the vocabulary (default: the checkpoint's, or its training data)",
    )  # fmt: skip
    export.add_argument("--max-shard-size", type=real(above=0), metavar="GB", help="hf: most weights in one file (5)")


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says.

    Raises:
        UserError: naming the file or flag, and what is wrong with it.
    """
    _ACTIONS[args.action](args)
    return 0


def _inspect(args: argparse.Namespace) -> None:
    from ..checkpoints.files import read_checkpoint
    from ..checkpoints.summary import summarize

    summaries = [summarize(path, read_checkpoint(path)) for path in args.checkpoint]
    say("\n\n".join(map(describe, summaries)))
    if args.json:
        figures = [{**dataclasses.asdict(one), "path": str(one.path), "total": one.total} for one in summaries]
        write_json(args.json, figures)


def _convert(args: argparse.Namespace) -> None:
    from ..checkpoints.files import OPTIMIZER_STATE, check_output, read_checkpoint, write_checkpoint
    from ..checkpoints.summary import summarize

    if args.source.suffix == args.target.suffix:
        raise UserError(f"{args.source} to {args.target}: one must be a .pt, the other a .safetensors file")
    check_output(args.target, overwrite=args.overwrite)
    checkpoint = read_checkpoint(args.source)
    _require_configuration(checkpoint, args.source, args.target)
    dropped = args.weights_only and checkpoint.pop(OPTIMIZER_STATE, None) is not None
    summary = summarize(args.source, checkpoint)  # before anything is replaced: it finds what is no checkpoint
    write_checkpoint(checkpoint, args.target, overwrite=args.overwrite)
    say(f"{args.target}: {summary.total:,} parameters, {byte_size(args.target.stat().st_size)}")
    if summary.optimizer:
        say("everything is kept: a training resumes from it as from the source")
    else:
        reason = f"optimizer state: {'left out' if dropped else 'not in the source'}; a training cannot resume"
        say(f"{reason}, but --finetune-from-model starts from the weights")


def _require_configuration(checkpoint: Mapping[str, Any], source: Path, target: Path) -> None:
    if target.suffix == ".pt" and "cfg" not in checkpoint:
        raise UserError(
            f"{source} has no configuration of fairseq, so no .pt that fairseq opens can be made of it: it was not "
            "written by mhmoe checkpoint convert"
        )


def _average(args: argparse.Namespace) -> None:
    from ..checkpoints.average import average, choose_inputs
    from ..checkpoints.files import check_output, write_checkpoint

    check_output(args.output, overwrite=args.overwrite)
    paths = choose_inputs(
        args.inputs, args.num_epoch_checkpoints, args.num_update_checkpoints, args.checkpoint_upper_bound
    )
    mean = average(paths)
    _require_configuration(mean, paths[-1], args.output)
    write_checkpoint(mean, args.output, overwrite=args.overwrite)
    head = f"{args.output}: the mean of {len(paths)} checkpoints, without optimizer state"
    say("\n  ".join([head, *map(str, paths)]))


def _pack(args: argparse.Namespace) -> None:
    from ..checkpoints.files import check_output, write_checkpoint
    from ..checkpoints.packed import pack_checkpoint
    from ..checkpoints.summary import summarize

    check_output(args.target, overwrite=args.overwrite)
    packed = pack_checkpoint(args.source)
    write_checkpoint(packed, args.target, overwrite=args.overwrite)
    summary = summarize(args.target, packed)
    size, packed_size = byte_size(summary.file_bytes), byte_size(summary.dtypes["uint8"])
    say(f"{args.target}: {summary.total:,} parameters, {size}, of which 1.58-bit weights take {packed_size}")


def _mix(args: argparse.Namespace) -> None:
    from ..checkpoints.files import check_output, write_checkpoint
    from ..checkpoints.mix import mix

    check_output(args.output, overwrite=args.overwrite)
    branches = [*args.branch, *([args.seed] if args.include_seed else [])]
    numbers = {"moe_freq": args.moe_freq, "top_k": args.moe_top_k, "router_seed": args.router_seed}
    mixed = mix(args.seed, branches, **numbers)
    write_checkpoint(mixed, args.output, overwrite=args.overwrite)
    arch, layers = mixed["cfg"]["model"]["_name"], mixed["cfg"]["model"]["decoder_layers"]
    with_experts = layers // args.moe_freq
    others = "" if with_experts == layers else ", the networks of the others averaged"
    head = f"{args.output}: {arch}, {len(branches)} experts in {with_experts} of {layers} layers{others}; new routers"
    sizes = f"--arch {arch} --moe-freq {args.moe_freq} --moe-expert-count {len(branches)} --moe-top-k {args.moe_top_k}"
    resets = " ".join(f"--reset-{part}" for part in ("optimizer", "dataloader", "meters", "lr-scheduler"))
    tail = f"to train on: fairseq-train ... {sizes} --restore-file {args.output} {resets}"
    say("\n  ".join([head, *map(str, branches)]) + f"\n{tail}, and the branches' other flags of the model")


def _import_official(args: argparse.Namespace) -> None:
    from ..checkpoints.official.importing import import_official

    options = {name: getattr(args, name) for name in ("routing", "data", "layers_only", "overwrite")}
    say("\n".join(import_official(args.checkpoint, args.out, **options)))


def _export(args: argparse.Namespace) -> None:
    from ..checkpoints.huggingface.export import export_model, import_folder

    if args.format == "fairseq":
        for flag in ("data", "max_shard_size"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} has no meaning with --format fairseq")
        say("\n".join(import_folder(args.source, args.out)))
        return
    shard_bytes = round((args.max_shard_size or 5) * 1e9)
    measured = _measured(args.source)
    say("\n".join(export_model(args.source, args.out, data=args.data, shard_bytes=shard_bytes, measured=measured)))


def _measured(checkpoint: Path) -> list[list[str]]:
    """The metrics of a checkpoint in the records beside it: name, value, unit, split, digest of the data."""
    from ..evaluation.records import read_record
    from ..models.language_model import find_checkpoint

    file = find_checkpoint(checkpoint, None)
    records = [read_record(path) for path in sorted(file.parent.glob("record-*.json"))]
    if records:
        exported = sha256_of(file)
        records = [record for record in records if record.checkpoint.get("sha256") == exported]
    return [
        [name, f"{metric.value:.4g}", metric.unit, record.split, str(record.data.get("digest", MISSING))[:16]]
        for record in records
        for name, metric in record.metrics.items()
    ]


_ACTIONS = {
    "inspect": _inspect,
    "convert": _convert,
    "average": _average,
    "pack": _pack,
    "mix": _mix,
    "import-official": _import_official,
    "export": _export,
}


def describe(summary: "CheckpointSummary") -> str:
    """The figures of one file as text."""
    rows = [[part, f"{count:,}", f"{count / summary.total:.1%}"] for part, count in summary.parameters.items()]
    rows.append(["all", f"{summary.total:,}", "100.0%"])
    dtypes = ", ".join(f"{dtype} {byte_size(size)}" for dtype, size in summary.dtypes.items())
    lines = [
        f"{summary.path}: {byte_size(summary.file_bytes)}",
        f"model: {_model_line(summary)}",
        f"training: {_progress_line(summary)}",
        f"experts: {_experts_line(summary)}",
        "",
        markdown_table(["part", "parameters", "share"], rows),
        "",
        f"weights: {dtypes}",
        f"optimizer: {_optimizer_line(summary)}",
        f"dictionary: {summary.fingerprint or MISSING} (SHA-256 of its symbols)",
        f"data: {summary.data or MISSING}, corpus {summary.corpus or 'not at hand, nor its manifest'}",
    ]
    return "\n".join(lines)


def _model_line(summary: "CheckpointSummary") -> str:
    if summary.arch is None:
        return f"{MISSING} (no configuration is stored)"
    sizes = [f"{stack}_{size}" for stack in ("decoder", "encoder") for size in ("layers", "embed_dim", "ffn_embed_dim")]
    images = ("img_size", "patch_size", "max_text_length", "mhmoe_modality_experts")
    experts = ("mhmoe_heads_number", "moe_top_k", "mhmoe_granularity", "mhmoe_shared_experts")
    names = (*sizes, *images, *experts, "mhmoe_routing", "mhmoe_budget")
    given = (f"{name} {summary.settings[name]}" for name in names if name in summary.settings)
    return ", ".join([summary.arch, *given])


def _progress_line(summary: "CheckpointSummary") -> str:
    best = "" if summary.best is None else f", best validation loss {summary.best}"
    ranks = "" if summary.world_size is None else f", written by {summary.world_size} ranks"
    updates = MISSING if summary.updates is None else f"{summary.updates:,}"
    return f"{updates} updates, epoch {summary.epoch or MISSING}{best}{ranks}"


def _experts_line(summary: "CheckpointSummary") -> str:
    if not summary.experts:
        return "none (dense)"
    counts = sorted(set(summary.experts.values()))
    separate = any(name.endswith("moe_layer.A") for name in summary.experts)
    pools = "pools, two in each MoE layer" if separate else "MoE layers"
    return f"{' or '.join(map(str, counts))} in each of {len(summary.experts)} {pools}"


def _optimizer_line(summary: "CheckpointSummary") -> str:
    if summary.optimizer is None:
        return "no state: evaluate, or start from the weights with --finetune-from-model"
    state = "of every parameter" if summary.complete else "but not two moments for every parameter"
    size = byte_size(summary.optimizer_bytes)
    return f"{summary.optimizer}, {summary.optimizer_tensors} tensors, {size}, {state}"

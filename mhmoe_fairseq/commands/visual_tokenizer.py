"""``mhmoe visual-tokenizer``: fit one to training images, say what a file holds, show the ids of images."""

import argparse
import json
from typing import TYPE_CHECKING

from ..common.arguments import add_action, add_fields, existing_file, existing_folder, output_file, real, seed, whole
from ..common.console import say
from ..common.errors import UserError
from ..common.files import write_json
from ..prepare.visual_tokenizers.settings import TOKENIZER_FILE, KMeansSettings, VQVAESettings

if TYPE_CHECKING:
    from ..data.visual_tokenizers import VisualTokenizer

KINDS: dict[str, type[KMeansSettings] | type[VQVAESettings]] = {"patch-kmeans": KMeansSettings, "vqvae": VQVAESettings}
_FIT = """\
Only the training images of a prepared folder are used. Writes FILE, beside it FILE.png with held-out images over
what their ids decode to, and FILE.json with the figures; the last line says how many codes held-out images use.
patch-kmeans takes seconds; vqvae a few minutes on a processor.

  mhmoe visual-tokenizer fit data/emoji --vocab-size 512 --patch-size 16 --image-size 64
  mhmoe visual-tokenizer fit data/emoji --kind vqvae --output data/emoji/vqvae.pt --updates 2000
"""
_INFO = """\
Ours, or a VQ-KD checkpoint of BEiT v2, which every command takes as it is.

  mhmoe visual-tokenizer info data/emoji/visual_tokenizer.pt
"""
_ENCODE = """\
One line of JSON per image: its file and the rows of ids.

  mhmoe visual-tokenizer encode data/emoji/visual_tokenizer.pt data/emoji/images/1f34e.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe visual-tokenizer fit|info|encode``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|info|encode")
    _add_fit_arguments(add_action(actions, "fit", "fit one to a prepared folder's training images", _FIT))
    info = add_action(actions, "info", "say what a file holds", _INFO)
    info.add_argument("file", type=existing_file, metavar="FILE", help="a visual tokenizer")
    encode = add_action(actions, "encode", "show the ids of images", _ENCODE)
    encode.add_argument("file", type=existing_file, metavar="FILE", help="a visual tokenizer")
    encode.add_argument("images", type=existing_file, nargs="+", metavar="IMAGE", help="any that Pillow reads")


def _add_fit_arguments(fit: argparse.ArgumentParser) -> None:
    kmeans, vqvae = KMeansSettings(), VQVAESettings()
    fit.add_argument("data", type=existing_folder, metavar="DATA", help="folder of mhmoe prepare image-text")
    fit.add_argument("--kind", choices=tuple(KINDS), default="patch-kmeans", help="what is fitted")
    fit.add_argument("--output", type=output_file, metavar="FILE", help=f"(default: {TOKENIZER_FILE} in DATA)")
    fit.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_fields(
        fit, kmeans,
        ("vocab_size", whole(), "N", "number of codes"),
        ("patch_size", whole(), "N", "side of a patch in pixels"),
        ("image_size", whole(), "N", "side of the images that it takes; both sizes give the grid of ids"),
        ("max_patches", whole(), "N", "patch-kmeans: about how many patches are used"),
        ("iterations", whole(), "N", "patch-kmeans: of Lloyd's algorithm"),
        ("seed", seed, "N", "of everything that is drawn"),
    )  # fmt: skip
    add_fields(
        fit, vqvae,
        ("updates", whole(), "N", "vqvae: steps"),
        ("batch_size", whole(), "N", "vqvae: images in a step"),
        ("device", str, None, "vqvae: where to train"),
    )  # fmt: skip
    fit.add_argument(
        "--lr", dest="learning_rate", type=real(above=0, below=1), default=vqvae.learning_rate, metavar="RATE",
        help="vqvae: at the start",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Does what ``args.action`` says; ``UserError`` for a bad flag, no tokenizer, or an image that cannot be read."""
    {"fit": _fit, "info": _show, "encode": _show}[args.action](args)
    return 0


def _fit(args: argparse.Namespace) -> None:
    from ..prepare.visual_tokenizers.fitting import draw_comparison, fit_tokenizer

    output, kind = args.output or args.data / TOKENIZER_FILE, KINDS[args.kind]
    if output.exists() and not args.overwrite:
        raise UserError(f"--output {output}: is there already; name another file, or add --overwrite to replace it")
    settings = kind(**{name: value for name, value in vars(args).items() if name in kind.__dataclass_fields__})
    settings.check()
    if "device" in kind.__dataclass_fields__:
        _check_device(args.device)
    tokenizer = fit_tokenizer(args.data, settings, say)
    tokenizer.save(output)
    write_json(output.with_name(output.name + ".json"), describe(tokenizer))
    draw_comparison(tokenizer, args.data, output.with_name(output.name + ".png"), args.seed)
    for split in ("train", "valid"):
        if split in tokenizer.provenance:
            measured = tokenizer.provenance[split].items()
            say(f"{split}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in measured))
    say(f"done: {output}")


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device ({name}): PyTorch cannot use it here ({reason})") from error


def describe(tokenizer: "VisualTokenizer") -> dict[str, object]:
    """Returns what a file holds, as JSON values."""
    return {
        "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "patch_size": tokenizer.patch_size,
        "image_size": tokenizer.image_size, "token_shape": list(tokenizer.token_shape),
        "parameters": sum(value.numel() for value in tokenizer.state_dict().values()),
        "settings": tokenizer.settings, "provenance": tokenizer.provenance,
    }  # fmt: skip


def _show(args: argparse.Namespace) -> None:
    """Says what a file holds, or the ids that it gives images."""
    from ..data.images.reading import read_image
    from ..data.images.transforms import EvaluationViews
    from ..data.visual_tokenizers import load_visual_tokenizer

    tokenizer = load_visual_tokenizer(args.file)
    if args.action == "info":
        say(json.dumps(describe(tokenizer), indent=2))
        return
    views = EvaluationViews(tokenizer.image_size, tokenizer.image_size)
    for path in args.images:
        ids = tokenizer.encode(views(read_image(path))[1][None]).view(tokenizer.token_shape)
        say(json.dumps({"image": str(path), "ids": ids.tolist()}))

"""``mhmoe visual-tokenizer``: fit one to training images, say what a file holds, show the ids of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arguments import existing_file, existing_folder, output_file, real, seed, whole
from ..common.console import say
from ..common.errors import UserError
from ..common.files import atomic_path, write_json

if TYPE_CHECKING:
    from ..data.visual_tokenizers import VisualTokenizer

KINDS = ("patch-kmeans", "vqvae")
_SHOWN = 12
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
    """Flags of ``mhmoe visual-tokenizer fit|info|encode``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="fit|info|encode")

    def action(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.\n\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    _add_fit_arguments(action("fit", "fit a visual tokenizer to the training images of a prepared folder", _FIT))
    info = action("info", "say what a file holds", _INFO)
    info.add_argument("file", type=existing_file, metavar="FILE", help="a visual tokenizer")
    encode = action("encode", "show the ids of images", _ENCODE)
    encode.add_argument("file", type=existing_file, metavar="FILE", help="a visual tokenizer")
    encode.add_argument("images", type=existing_file, nargs="+", metavar="IMAGE", help="any that Pillow reads")


def _add_fit_arguments(fit: argparse.ArgumentParser) -> None:
    from ..prepare.visual_tokenizers.fitting import FILE, FitSettings
    from ..prepare.visual_tokenizers.vqvae_training import VQVAESettings

    kmeans, vqvae = FitSettings(), VQVAESettings()
    fit.add_argument("data", type=existing_folder, metavar="DATA", help="folder of mhmoe prepare image-text")
    fit.add_argument("--kind", choices=KINDS, default=KINDS[0], help="(default: %(default)s)")
    fit.add_argument("--output", type=output_file, metavar="FILE", help=f"(default: {FILE} in DATA)")
    fit.add_argument("--overwrite", action="store_true", help="replace an existing file")
    numbers = {
        "--vocab-size": (kmeans.vocab_size, "number of codes"),
        "--patch-size": (kmeans.patch_size, "side of a patch in pixels"),
        "--image-size": (kmeans.image_size, "side of the images that it takes; both sizes give the grid of ids"),
        "--max-patches": (kmeans.max_patches, "patch-kmeans: about how many patches are used"),
        "--iterations": (kmeans.iterations, "patch-kmeans: of Lloyd's algorithm"),
        "--updates": (vqvae.updates, "vqvae: steps"),
        "--batch-size": (vqvae.batch_size, "vqvae: images in a step"),
    }
    for flag, (value, text) in numbers.items():
        fit.add_argument(flag, type=whole(), default=value, metavar="N", help=f"{text} (default: %(default)s)")
    fit.add_argument(
        "--seed", type=seed, default=kmeans.seed, metavar="N",
        help="of everything that is drawn (default: %(default)s)",
    )  # fmt: skip
    fit.add_argument(
        "--lr",
        type=real(above=0),
        default=vqvae.learning_rate,
        metavar="RATE",
        help="vqvae: at the start (default: %(default)s)",
    )
    fit.add_argument("--device", default=vqvae.device, help="vqvae: where to train (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says.

    Raises:
        UserError: a bad flag, a file that is no tokenizer, an image that cannot be read.
    """
    {"fit": _fit, "info": _info, "encode": _encode}[args.action](args)
    return 0


def _fit(args: argparse.Namespace) -> None:
    from ..prepare.visual_tokenizers.fitting import FILE, FitSettings, fit_kmeans
    from ..prepare.visual_tokenizers.vqvae_training import VQVAESettings, fit_vqvae

    output = args.output or args.data / FILE
    if output.exists() and not args.overwrite:
        raise UserError(f"--output {output}: is there already; name another file, or add --overwrite to replace it")
    sizes = {name: getattr(args, name) for name in ("vocab_size", "patch_size", "image_size", "seed")}
    if args.kind == "vqvae":
        vqvae = VQVAESettings(
            **sizes, updates=args.updates, batch_size=args.batch_size, learning_rate=args.lr, device=args.device
        )
        tokenizer: VisualTokenizer = fit_vqvae(args.data, vqvae, say)
    else:
        kmeans = FitSettings(**sizes, max_patches=args.max_patches, iterations=args.iterations)
        tokenizer = fit_kmeans(args.data, kmeans, say)
    tokenizer.save(output)
    write_json(output.with_name(output.name + ".json"), describe(tokenizer))
    _draw_comparison(tokenizer, args.data, output.with_name(output.name + ".png"), args.seed)
    for split in ("train", "valid"):
        if split in tokenizer.provenance:
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in tokenizer.provenance[split].items()
            )
            say(f"{split}: {figures}")
    say(f"done: {output}")


def _draw_comparison(tokenizer: VisualTokenizer, data: Path, path: Path, seed: int) -> None:
    """A dozen held-out images (training ones where none are held out) over their reconstructions."""
    from torchvision.transforms.functional import to_pil_image

    from ..data.multimodal.index import index_files
    from ..prepare.visual_tokenizers.fitting import comparison, whole_images

    split = next(split for split in ("valid", "train") if index_files(data, "image", split)[0].is_file())
    images = whole_images(data, split, tokenizer.image_size, _SHOWN, seed)
    with atomic_path(path) as temporary:
        to_pil_image(comparison(tokenizer, images)).save(temporary, format="PNG")


def describe(tokenizer: VisualTokenizer) -> dict[str, object]:
    """What a file holds, as JSON values."""
    return {
        "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "patch_size": tokenizer.patch_size,
        "image_size": tokenizer.image_size, "token_shape": list(tokenizer.token_shape),
        "parameters": sum(value.numel() for value in tokenizer.state_dict().values()),
        "settings": tokenizer.settings(), "provenance": tokenizer.provenance,
    }  # fmt: skip


def _info(args: argparse.Namespace) -> None:
    from ..data.visual_tokenizers import load_visual_tokenizer

    say(json.dumps(describe(load_visual_tokenizer(args.file)), indent=2))


def _encode(args: argparse.Namespace) -> None:
    from ..data.images.reading import read_image
    from ..data.images.transforms import EvaluationViews
    from ..data.visual_tokenizers import load_visual_tokenizer

    tokenizer = load_visual_tokenizer(args.file)
    views = EvaluationViews(tokenizer.image_size, tokenizer.image_size)
    for path in args.images:
        ids = tokenizer.encode(views(read_image(path))[1][None]).view(tokenizer.token_shape)
        say(json.dumps({"image": str(path), "ids": ids.tolist()}))

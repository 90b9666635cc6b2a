"""``mhmoe generate``: continue prompts with a trained language model, or caption images with a fine-tuned one."""

import argparse
import json
import re
import sys
from pathlib import Path

from ..common.arguments import (
    add_device_arguments,
    existing_file,
    existing_folder,
    existing_path,
    output_file,
    real,
    seed,
    whole,
)
from ..common.console import quiet, say
from ..common.errors import UserError
from ..common.ranges import flag
from .evaluate import add_caption_arguments

_OF_SEARCH = ("max_len_b", "sampling", "temperature", "top_k", "top_p", "seed")
_OF_TEXT, _OF_IMAGES = (*_OF_SEARCH, "json"), ("output", "length_penalty", "max_len")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``mhmoe generate``."""
    add = parser.add_argument
    add("checkpoint", type=existing_path, metavar="CHECKPOINT", help="a checkpoint, or the folder that holds one")
    add(
        "--data", type=existing_folder, metavar="DIR",
        help="folder with dict.txt and the vocabulary; the checkpoint's own, or that of its training data",
    )  # fmt: skip
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a text to continue; may be repeated")
    prompts.add_argument(
        "--prompts-file",
        type=_prompts_file,
        metavar="FILE",
        help="a UTF-8 file with one prompt per line; - reads stdin",
    )
    prompts.add_argument("--image", nargs="+", type=existing_file, metavar="FILE", help="images to caption")
    add("--max-len-b", type=whole(), metavar="N", help="longest text in tokens, prompt included (default: 200)")
    add(
        "--beam", type=whole(), metavar="B",
        help="hypotheses kept by beam search; 1 is greedy, and what texts have if not given; captions, the training's",
    )  # fmt: skip
    add("--sampling", action="store_true", help="draw tokens in place of searching the best text")
    add("--temperature", type=real(above=0), metavar="T", help="divides the logits (default: 1)")
    add("--top-k", type=whole(), metavar="K", help="sample among the K most probable tokens")
    add(
        "--top-p", type=real(above=0, at_most=1), metavar="P",
        help="sample among the likeliest tokens of joint probability P",
    )  # fmt: skip
    add("--seed", type=seed, help="of the sampling (default: 1)")
    add("--batch-size", type=whole(), default=8, metavar="N", help="prompts that are decoded together")
    add(
        "--json", action="store_true",
        help="print a JSON object per prompt: prompt, text, score (mean log-probability in nats), tokens, token_scores",
    )  # fmt: skip
    add_device_arguments(parser)
    captions = parser.add_argument_group("captions of --image")
    captions.add_argument("--output", type=output_file, metavar="FILE", help='write [{"image_path", "caption"}]')
    add_caption_arguments(captions)


def run(args: argparse.Namespace) -> int:
    """Prints one text, or JSON object, per prompt, or the caption of each image."""
    for name in _OF_IMAGES if args.image is None else _OF_TEXT:
        if not (getattr(args, name) is None or getattr(args, name) is False):
            raise UserError(f"{flag(name)}: {'needs' if args.image is None else 'has no meaning with'} --image")
    return _continue(args) if args.image is None else _caption(args)


def _caption(args: argparse.Namespace) -> int:
    from ..checkpoints.open import open_model
    from ..evaluation.captions import caption_images, find_search
    from ..evaluation.images import write_objects

    with quiet():
        opened = open_model(args.checkpoint, args.data, "cpu" if args.cpu else None, precision=args.precision)
    search = find_search(opened, args.beam, args.length_penalty, args.max_len)
    captions = []
    for path, caption in zip(args.image, caption_images(opened, args.image, search, args.batch_size)):
        say(f"{path}: {caption}")
        captions.append({"image_path": str(path), "caption": caption})
    if args.output is not None:
        write_objects(args.output, captions)
    return 0


def _continue(args: argparse.Namespace) -> int:
    prompts = args.prompt if args.prompts_file is None else read_prompts(args.prompts_file)
    # Imported late, so that `mhmoe generate --help` is quick.
    from ..checkpoints.open import open_text_model
    from ..evaluation.generation import Search, continue_prompts

    given = {name: value for name in _OF_SEARCH if (value := getattr(args, name)) is not None}
    search = Search(args.beam or 1, **given)
    model = open_text_model(args.checkpoint, args.data, "cpu" if args.cpu else None, args.precision)
    for continuation in continue_prompts(model, prompts, search, batch_size=args.batch_size):
        say(json.dumps(continuation._asdict(), ensure_ascii=False) if args.json else continuation.text)
    return 0


def _prompts_file(text: str) -> str | Path:
    return text if text == "-" else existing_file(text)


def read_prompts(name: str | Path) -> list[str]:
    """The lines of a file, or of stdin for ``-``; empty ones too.

    Raises:
        UserError: the file is empty or no UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {name}: invalid UTF-8 at byte {error.start}") from error
    if not text:
        raise UserError(f"--prompts-file {name}: no prompt in it")
    return re.sub("\r\n?", "\n", text).removesuffix("\n").split("\n")

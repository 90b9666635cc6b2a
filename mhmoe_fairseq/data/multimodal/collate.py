"""Samples to batches: texts padded on the right, images stacked."""

from typing import Any, Sequence

import torch
from fairseq.data import data_utils
from torch import Tensor

Sample = dict[str, Any]


def pad_texts(texts: Sequence[Tensor], pad: int) -> Tensor:
    """``(B, S)``: rows of ``(length,)``, padded on the right to the longest."""
    return data_utils.collate_tokens(list(texts), pad)


def stack(samples: Sequence[Sample], key: str) -> Tensor | None:
    """The tensors of equal shape that every sample has under ``key``; None if they have none."""
    if samples[0].get(key) is None:
        return None
    return torch.stack([sample[key] for sample in samples])


def pad_key(samples: Sequence[Sample], key: str, pad: int) -> Tensor | None:
    """As ``pad_texts``, of what every sample has under ``key``; None if they have none."""
    if samples[0].get(key) is None:
        return None
    return pad_texts([sample[key] for sample in samples], pad)


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Any]:
    """What the batches of all data sets have.

    Args:
        samples: with ``id``, ``is_replaced``, and ``text (S,)`` and ``image (3, H, W)`` where there are such.

    Returns:
        ``id (B,)``; ``nsentences``, the number of samples; ``ntokens``, that of the texts' tokens, or without texts of
        images; ``num_replaced``, that of samples that stand for one with a bad image; ``net_input`` with
        ``text_tokens (B, S)`` or None and ``images (B, 3, H, W)`` or None.
    """
    text_tokens = pad_key(samples, "text", pad)
    return {
        "id": torch.tensor([sample["id"] for sample in samples]),
        "nsentences": len(samples),
        "ntokens": len(samples) if text_tokens is None else sum(len(sample["text"]) for sample in samples),
        "num_replaced": sum(sample["is_replaced"] for sample in samples),
        "net_input": {"text_tokens": text_tokens, "images": stack(samples, "image")},
    }


def add_masking(batch: dict[str, Any], samples: Sequence[Sample], pad: int) -> None:
    """Add what masked data modelling predicts, and count it as ``ntokens`` and all positions as ``num_positions``.

    Adds ``text_targets (B, S)`` or None, ``tokenizer_images (B, 3, H2, W2)`` uint8 or None, and to
    ``net_input`` ``masked_patches (B, N)`` bool or None. Where the targets and the masked patches are, as places in
    these flattened, is in ``masked_token_places`` and ``masked_patch_places``, ``(M,)`` or None: from a mask the host
    would have to learn their number, and wait for the device.
    """
    batch["text_targets"] = pad_key(samples, "text_targets", pad)
    batch["tokenizer_images"] = stack(samples, "tokenizer_image")
    masked_patches = batch["net_input"]["masked_patches"] = stack(samples, "masked_patches")
    targets = batch["text_targets"]
    batch["masked_token_places"] = None if targets is None else _places(targets.ne(pad))
    batch["masked_patch_places"] = None if masked_patches is None else _places(masked_patches)
    batch["ntokens"] = batch["num_positions"] = 0
    if targets is not None:
        batch["ntokens"] += batch["masked_token_places"].numel()
        batch["num_positions"] += sum(len(sample["text"]) for sample in samples)
    if masked_patches is not None:
        batch["ntokens"] += batch["masked_patch_places"].numel()
        batch["num_positions"] += masked_patches.numel() + len(samples)  # with the class positions


def _places(mask: Tensor) -> Tensor:
    """``(M,)`` places of True in the flattened mask."""
    return mask.flatten().nonzero().squeeze(1)

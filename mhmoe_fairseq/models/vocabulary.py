"""A model remembers its dictionary: checkpoints are refused with another, even where the sizes agree."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from ..common.errors import UserError


class RemembersVocabulary(nn.Module):
    """Among a module's bases: its state has one tensor that is no parameter, a fingerprint of the dictionary.

    Attributes:
        vocabulary_fingerprint: int64 ``(4,)``.
        embedding_name: of the embedding's weight within the module, for messages.
    """

    vocabulary_fingerprint: Tensor
    embedding_name: str
    dictionary: Dictionary

    def remember_vocabulary(self, dictionary: Dictionary, embedding_name: str) -> None:
        """Take the fingerprint, once in the constructor."""
        self.embedding_name = embedding_name
        self.register_buffer("vocabulary_fingerprint", torch.tensor(fingerprint(dictionary)))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        key = prefix + "vocabulary_fingerprint"
        saved = state_dict.setdefault(key, self.vocabulary_fingerprint)
        if (
            not saved.is_meta
            and not self.vocabulary_fingerprint.is_meta
            and not torch.equal(saved.cpu(), self.vocabulary_fingerprint.cpu())
        ):
            embedding = state_dict.get(prefix + self.embedding_name)
            words = "" if embedding is None else f"{embedding.size(0):,} "
            raise UserError(
                f"the checkpoint's dictionary ({words}words) is not this data's dict.txt ({len(self.dictionary):,} "
                "words): use the data folder that the model was trained on, or one prepared with its dictionary"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def fingerprint(dictionary: Dictionary) -> list[int]:
    """Four 64-bit numbers from the SHA-256 of the symbols in order."""
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode()).digest()
    return list(struct.unpack("<4q", digest))

"""Writing and scoring captions, below the tasks: pure Python and PyTorch on an interface, no fairseq."""

from .ground_truth import read_ground_truth
from .scores import BLEU_ORDERS, CiderD, bleu, rouge_l
from .search import Caption, CaptionSearch, CaptionWriter, Specials, search_captions
from .tokenizer import tokenize

__all__ = [
    "BLEU_ORDERS",
    "Caption",
    "CaptionSearch",
    "CaptionWriter",
    "CiderD",
    "Specials",
    "bleu",
    "read_ground_truth",
    "rouge_l",
    "search_captions",
    "tokenize",
]

"""Scores of captions; all but METEOR and SPICE in pure Python."""

from .coco import score_captions
from .ground_truth import read_ground_truth
from .scores import BLEU_ORDERS, CiderD, bleu, rouge_l
from .tokenizer import tokenize

__all__ = ["BLEU_ORDERS", "CiderD", "bleu", "read_ground_truth", "rouge_l", "score_captions", "tokenize"]

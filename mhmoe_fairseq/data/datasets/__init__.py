"""The data sets of pre-training and fine-tuning; a sample is decoded where it is drawn, in a worker of the loader."""

from .base import DatasetSettings, ImageTextDataset
from .captions import CaptionDataset, RetrievalDataset
from .labelled import ImagePairs, LabelledImages, VQADataset
from .masked import MaskedImages, MaskedPairs, MaskedTexts

__all__ = [
    "CaptionDataset",
    "DatasetSettings",
    "LabelledImages",
    "MaskedImages",
    "MaskedPairs",
    "MaskedTexts",
    "ImagePairs",
    "ImageTextDataset",
    "RetrievalDataset",
    "VQADataset",
]

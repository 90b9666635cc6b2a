"""The data sets of pre-training and fine-tuning; a sample is decoded where it is drawn, in a worker of the loader."""

from .base import DatasetSettings, PictureTextDataset
from .captions import CaptionDataset, RetrievalDataset
from .labelled import LabelledPictures, PicturePairs, VQADataset
from .masked import MaskedImages, MaskedPairs, MaskedTexts

__all__ = [
    "CaptionDataset",
    "DatasetSettings",
    "LabelledPictures",
    "MaskedImages",
    "MaskedPairs",
    "MaskedTexts",
    "PicturePairs",
    "PictureTextDataset",
    "RetrievalDataset",
    "VQADataset",
]

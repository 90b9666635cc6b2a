"""How a visual tokenizer is fitted: what ``mhmoe visual-tokenizer fit`` and ``mhmoe prepare image-text`` ask for."""

from dataclasses import dataclass
from typing import ClassVar

TOKENIZER_FILE = "visual_tokenizer.pt"


@dataclass(frozen=True)
class FitSettings:
    """What every kind takes."""

    vocab_size: int = 512  # number of codes
    patch_size: int = 16  # side of a patch in pixels
    image_size: int = 64  # side of the images it takes
    seed: int = 1  # of everything that is drawn

    def check(self, vocab_flag: str = "--vocab-size") -> None:
        """``UserError`` that names the flag of a bad size."""
        from ...data.visual_tokenizers.base import check_sizes

        check_sizes(self.vocab_size, self.patch_size, self.image_size, vocab_flag)


@dataclass(frozen=True)
class KMeansSettings(FitSettings):
    """Codes that are mean patches."""

    max_patches: int = 60_000  # about how many patches k-means sees
    iterations: int = 15

    @property
    def max_images(self) -> int:
        """How many training images are read at most."""
        return min(8192, self.max_patches)


@dataclass(frozen=True)
class VQVAESettings(FitSettings):
    """The small convolutional network."""

    updates: int = 1000  # steps of AdamW
    batch_size: int = 32  # images in a step
    learning_rate: float = 2e-3  # at the start; it falls to zero by a cosine
    decay: float = 0.95  # of the codes' moving average
    commitment: float = 0.25  # weight of the vectors' distance from their codes, beside the error of the images
    device: str = "cpu"
    max_images: ClassVar[int] = 4096

"""The two visual tokenizers that ``mhmoe visual-tokenizer fit`` makes of training images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Provenance, VisualTokenizer, from_patches, nearest, to_patches


class PatchKMeans(VisualTokenizer):
    """Codes that are mean patches: k-means on the pixels of the training images.

    They are low-level targets (colours and edges, not meanings); ids and losses cannot be compared with another
    tokenizer's.

    Args:
        centroids: (vocab_size, 3 * patch_size ** 2), differences from ``mean``; zeros if not given.
        mean: (3 * patch_size ** 2,), the mean of all training patches; zeros if not given.
    """

    kind = "patch_kmeans"
    centroids: Tensor
    mean: Tensor

    def __init__(
        self, *sizes: int, provenance: Provenance = None, centroids: Tensor | None = None, mean: Tensor | None = None
    ) -> None:
        super().__init__(*sizes, provenance=provenance)
        width = 3 * self.patch_size**2
        self.register_buffer("centroids", torch.zeros(self.vocab_size, width) if centroids is None else centroids)
        self.register_buffer("mean", torch.zeros(width) if mean is None else mean)

    def _encode(self, images: Tensor) -> Tensor:
        return nearest(to_patches(images, self.patch_size) - self.mean, self.centroids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Return every patch replaced by its code: (B, N) -> (B, 3, image_size, image_size)."""
        patches = self.centroids[ids.to(self.device)] + self.mean
        return from_patches(patches, self.patch_size, self.image_size).clamp(0, 1)


class _Mixing(nn.Module):
    """Two convolutions over the grid of patches, added to their input."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, rows, columns), same out."""
        return x + self.outer(F.gelu(self.inner(F.gelu(x))))


class VQVAE(VisualTokenizer):
    """A small convolutional network with a learnt codebook, trained to rebuild the images.

    Patches become vectors, a few convolutions let neighbouring patches see each other, and the nearest code by cosine
    takes a vector's place; the mirror image of that network rebuilds the image. Codes are moving averages of the
    vectors that chose them, and those that nothing chooses are put onto vectors of the current batch.

    Args:
        width, code_width: channels of the convolutions, entries of a code.
        depth: convolution blocks on either side.
    """

    kind = "vqvae"
    codes: Tensor

    def __init__(
        self, *sizes: int, provenance: Provenance = None, width: int = 64, code_width: int = 16, depth: int = 2
    ) -> None:
        super().__init__(*sizes, provenance=provenance, width=width, code_width=code_width, depth=depth)
        pixels = 3 * self.patch_size**2
        self.to_features = nn.Linear(pixels, width)
        self.encoder = nn.Sequential(*(_Mixing(width) for _ in range(depth)))
        self.to_code = nn.Linear(width, code_width)
        self.from_code = nn.Linear(code_width, width)
        self.decoder = nn.Sequential(*(_Mixing(width) for _ in range(depth)))
        self.to_pixels = nn.Linear(width, pixels)
        self.register_buffer("codes", F.normalize(torch.randn(self.vocab_size, code_width), dim=1))

    def vectors(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, N, code_width), each of length one."""
        features = self.to_features(to_patches(2 * images - 1, self.patch_size))
        return F.normalize(self.to_code(self._on_grid(self.encoder, features)), dim=-1)

    def from_vectors(self, vectors: Tensor) -> Tensor:
        """(B, N, code_width) -> (B, 3, S, S), about in [0, 1]."""
        patches = self.to_pixels(self._on_grid(self.decoder, self.from_code(vectors)))
        return (from_patches(patches, self.patch_size, self.image_size) + 1) / 2

    def choose(self, vectors: Tensor) -> Tensor:
        """Ids of the nearest codes: (B, N, code_width) -> (B, N)."""
        return nearest(vectors, self.codes)

    def _on_grid(self, blocks: nn.Module, features: Tensor) -> Tensor:
        grid = features.transpose(1, 2).unflatten(2, self.token_shape)
        return blocks(grid).flatten(2).transpose(1, 2)

    def _encode(self, images: Tensor) -> Tensor:
        return self.choose(self.vectors(images))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The images of ids (B, N): (B, 3, image_size, image_size) in [0, 1]."""
        return self.from_vectors(self.codes[ids.to(self.device)]).clamp(0, 1)

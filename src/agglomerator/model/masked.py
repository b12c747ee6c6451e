"""Masked pre-training: patches of the image are hidden, and level 0 predicts their pixels."""

import torch
from torch import nn

from agglomerator.config.checks import HIDDEN
from agglomerator.data.transforms import send


class MaskedPatches(nn.Module):
    """Hides patches of 4x4 pixels before the tokenizer, and predicts pixels from level 0.

    As the successor of the published system does (Agglomerator++, 2022-24); the idea is that of He
    et al., "Masked autoencoders are scalable vision learners", 2022, arXiv 2111.06377.

    Args:
        settings: of the network.

    Attributes:
        patch: (C, 4, 4), learned, what stands in the place of each hidden patch.
        to_pixels: the linear map from a column to the pixels of the image below it.
    """

    def __init__(self, settings):
        super().__init__()
        s = settings
        self.patches, self.columns = s.image_size // HIDDEN, s.grid_size  # on a side
        self.patch = nn.Parameter(torch.zeros(s.n_channels, HIDDEN, HIDDEN))
        side = s.image_size // s.grid_size
        self.to_pixels = nn.Linear(s.patch_dim, s.n_channels * side**2)

    def draw(self, n_images, generator, device):
        """Choose half of the patches of each image, rounded down.

        Args:
            n_images: B.
            generator: torch.Generator on the CPU.
            device: of the result.

        Returns:
            (B, image_size, image_size) bool, True for the pixels of hidden patches.
        """
        n = self.patches**2
        order = torch.rand(n_images, n, generator=generator, dtype=torch.float32).argsort(1)
        hidden = (order < n // 2).unflatten(1, (self.patches, 1, self.patches, 1))
        hidden = hidden.expand(-1, -1, HIDDEN, -1, HIDDEN).flatten(3).flatten(1, 2)
        return send(hidden, device)

    def hide(self, images, hidden):
        """Put the learned patch in the place of each hidden one: images (B, C, H, W), hidden
        (B, H, W) -> (B, C, H, W). Neither a value nor a gradient of a hidden pixel gets through."""
        tiled = self.patch.repeat(1, self.patches, self.patches)
        return torch.where(hidden[:, None], tiled, images)

    def pixels(self, level):
        """The image that level 0 predicts: (d, B, n) -> (B, C, H, W)."""
        side = self.columns
        squares = self.to_pixels(level.permute(1, 2, 0))  # (B, n, C c^2)
        c = (squares.shape[2] // len(self.patch)) ** 0.5
        grid = squares.view(len(squares), side, side, len(self.patch), round(c), round(c))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

"""The heads: from the top level to the embedding, and from that to classes."""

import math

import torch.nn.functional as F
from torch import nn


class GridPool(nn.Module):
    """Means of the columns in the cells of a coarser grid: (B, n, d) -> (B, d * side^2).

    A mean over all columns would say little. The last norm of the column nets is over the columns:
    what they add has the same mean for every image, as long as that norm scales columns alike.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, columns):
        grid = columns.mT.unflatten(2, (math.isqrt(columns.shape[1]), -1))  # (B, d, S, S)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(1)


def contrastive_head(settings):
    """Top level (B, n, d) -> embedding (B, contr_dim), not yet of unit length.

    The kind "flatten", as published, has (n d)^2 weights; "grid" has head_side^2 d contr_dim,
    however many columns there are.
    """
    s = settings
    if s.head == "flatten":
        pool, width = nn.Flatten(), s.n_columns * s.patch_dim
    else:
        pool, width = GridPool(s.head_side), s.head_side**2 * s.patch_dim
    hidden = width if s.head == "flatten" else s.contr_dim
    return nn.Sequential(
        nn.LayerNorm(s.patch_dim),
        nn.Dropout(s.dropout),
        pool,  # (B, width)
        nn.LayerNorm(width),
        nn.Dropout(s.dropout),
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.LayerNorm(hidden),
        nn.Dropout(s.dropout),
        nn.Linear(hidden, s.contr_dim),
    )


def classifier(settings):
    """Embedding (B, contr_dim) -> logits (B, n_classes)."""
    width, n_classes = settings.contr_dim, settings.n_classes
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_classes))

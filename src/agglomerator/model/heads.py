"""The heads: from the top level to the embedding."""

import math

import torch.nn.functional as F
from torch import nn


class GridPool(nn.Module):
    """Means of the columns in the cells of a coarser grid: (B, n, d) -> (B, d * side * side).

    A mean over all columns would say little: the last norm of the column nets is over the columns,
    so that while it scales them alike, what they add has the same mean for every image.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, columns):
        grid = columns.mT.unflatten(2, (math.isqrt(columns.shape[1]), -1))  # (B, d, S, S)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(1)


def contrastive_head(kind, n_columns, d, contr_dim, dropout, side):
    """Top level (B, n, d) -> embedding (B, contr_dim), not yet of unit length.

    Of the kind "flatten", as published, it has (n * d)^2 weights; of the kind "grid"
    side^2 d contr_dim, however many columns there are.
    """
    if kind == "flatten":
        pool, width, hidden = nn.Flatten(), n_columns * d, n_columns * d
    else:
        pool, width, hidden = GridPool(side), side**2 * d, contr_dim
    return nn.Sequential(
        nn.LayerNorm(d),
        nn.Dropout(dropout),
        pool,
        nn.LayerNorm(width),
        nn.Dropout(dropout),
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.LayerNorm(hidden),
        nn.Dropout(dropout),
        nn.Linear(hidden, contr_dim),
    )

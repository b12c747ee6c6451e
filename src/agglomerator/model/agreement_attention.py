"""Agreement-aware consensus: a column follows those that are like it, and heeds those that are not.

Zeng et al., "Agreement aware and dissimilarity oriented GLOM", ICCV 2025.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from agglomerator.model.attention import distances
from agglomerator.model.tiles import Tiles
from agglomerator.util.precision import upcast, without_autocast

RADIUS = 3  # columns that see each other, as far as this on the grid
THRESHOLDS = 0.0, -0.2  # u and v, at level 0 and above it
TILED = 16  # columns on a side from which on tiles are less work than all pairs


class AgreementAttention(nn.Module):
    """The fifth contribution to a level. With s_ij the cosine of columns i and j, n columns, and
    j within `RADIUS` of i, itself among them:

        out_i = sum_j softmax_j(s_ij where s_ij >= u) l_j - (1/n) sum_j [s_ij < v] s_ij l_j

    The published thresholds u = v are 0 at level 0 and -0.2 at level 1; levels above that have
    those of level 1. Where v <= 0 every s_ij of the second sum is negative: as written it adds
    |s_ij| l_j, and so draws columns to those they are unlike.

    Args:
        grid_size: S, columns on a side.
        repel: take the second sum with the other sign, which drives unlike columns apart.
    """

    def __init__(self, grid_size, repel=False):
        super().__init__()
        # Stored, for nothing else in the weights tells the sign.
        self.register_buffer("sign", torch.tensor(1.0 if repel else -1.0))
        too_far = distances(grid_size) > RADIUS  # (n, n)
        self.tiles = Tiles(grid_size, RADIUS, too_far) if grid_size >= TILED else None
        self.register_buffer("too_far", None if self.tiles else too_far, persistent=False)

    def plain(self, level, number):
        """The equation: a level (d, B, n) and its number, 0 the lowest -> (d, B, n)."""
        value, n = level.transpose(0, 1), level.shape[-1]  # (B, d, n)
        unit = F.normalize(value, dim=1)
        cosine, threshold = unit.mT @ unit, THRESHOLDS[min(number, 1)]  # (B, n, n)
        too_far = (distances(math.isqrt(n)) > RADIUS).to(level.device)
        like = cosine.masked_fill((cosine < threshold) | too_far, -math.inf).softmax(-1)
        unlike = cosine.masked_fill((cosine >= threshold) | too_far, 0) / n
        return (value @ (like + self.sign * unlike).mT).transpose(0, 1)

    def forward(self, levels, first):
        """The same of levels `first` and following, with less rounding noise where columns are
        nearly equal, and less work on large grids: (k, d, B, n) -> (k, d, B, n)."""
        value = levels.transpose(1, 2)  # (k, B, d, n)
        shape, n = value.shape, value.shape[-1]
        value = value.reshape(-1, *shape[2:])  # (k B, d, n)
        unit, mean = F.normalize(upcast(value), dim=1), value.detach().mean(2, keepdim=True)
        low = torch.full((len(levels), shape[1]), THRESHOLDS[1], device=value.device)
        if first == 0:
            low[0].fill_(THRESHOLDS[0])
        low = low.view(-1, 1, 1)
        if self.tiles is None:
            both, sums = self._weights(unit, unit, low, self.too_far, n)
            out = (value - mean) @ both.to(value.dtype).mT
        else:
            cut, windows = self.tiles.cut, self.tiles.cut_windows
            both, sums = self._weights(
                cut(unit), windows(unit), low[:, None], self.tiles.too_far, n
            )
            out = self.tiles.join(windows(value - mean) @ both.to(value.dtype).mT)
            sums = self.tiles.join(sums[:, :, None])[:, 0]
        out = out + mean * sums[:, None].to(value.dtype)
        return out.view(shape).transpose(1, 2)

    def _weights(self, query, key, low, too_far, n):
        """The weight of column j for column i, from unit vectors (..., d, i) and (..., d, j) ->
        (..., i, j); and its sum over j, (..., i)."""
        with without_autocast(query.device):
            cosine = query.mT @ key
        is_like = cosine >= low
        like = cosine.masked_fill(too_far | ~is_like, -math.inf).softmax(-1)
        unlike = cosine.masked_fill(too_far | is_like, 0) * (self.sign / n)
        return like + unlike, 1 + unlike.sum(-1)

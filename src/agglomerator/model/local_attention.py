"""Attention within a radius whose work grows with n columns, not with n * n."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Tiles(nn.Module):
    """Cuts a grid of columns into T square tiles. Columns of a tile (queries) attend to those of a
    window (keys), `reach` wider on every side; `too_far` masks those beyond the radius.

    Args:
        grid_size: S, columns on a side.
        radius: more than 0; may be a fraction.
        too_far: (n, n) bool, columns that do not attend to each other.
    """

    def __init__(self, grid_size, radius, too_far):
        super().__init__()
        self.reach = int(min(radius, grid_size - 1))  # in columns along a side
        self.tile = min(grid_size, max(4, 2 * self.reach))
        self.beyond = -grid_size % self.tile  # columns that the last tiles lack
        number = torch.arange(1.0, grid_size**2 + 1)[None, None]  # 0 is outside the grid
        query = self.cut(number)[0, :, 0, :, None].long()  # (T, tile^2, 1)
        key = self.cut(number, self.reach)[0, :, 0, None].long()  # (T, 1, window^2)
        too_far = F.pad(too_far, (1, 0, 1, 0), value=True)[query, key]
        # Queries outside the grid attend to all: `join` drops the result, but it must be finite.
        self.register_buffer("too_far", too_far & (query > 0), persistent=False)
        self.register_buffer("itself", query == key, persistent=False)

    def cut(self, columns, around=0):
        """(B, c, n) -> (B, T, c, w^2), w = tile + 2 around; zeros outside the grid."""
        c, side = columns.shape[1], math.isqrt(columns.shape[2])
        grid = F.pad(columns.unflatten(2, (side, side)), (0, self.beyond) * 2)
        width = self.tile + 2 * around
        windows = F.unfold(grid, width, padding=around, stride=self.tile)  # (B, c w^2, T)
        return windows.mT.unflatten(2, (c, -1))

    def join(self, tiles):
        """(B, T, c, tile^2) -> (B, c, n)."""
        side = math.isqrt(tiles.shape[1]) * self.tile  # of the grid of all tiles
        grid = F.fold(tiles.flatten(2).mT, side, self.tile, stride=self.tile)
        inside = side - self.beyond
        return grid[:, :, :inside, :inside].flatten(2)

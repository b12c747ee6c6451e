"""Attention within a radius whose work grows with n columns, not with n * n."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Tiles(nn.Module):
    """Cuts a grid of columns into T square tiles. Columns of a tile (queries) attend to those of a
    window (keys) of twice its side around it; `too_far` masks those beyond the radius.

    Each window is put together from four tiles of the grid shifted by half a tile, since unfold and
    fold take a third of a training step on a CPU.

    Args:
        grid_size: S, columns on a side.
        radius: more than 0; may be a fraction.
        too_far: (n, n) bool, columns that do not attend to each other.
    """

    def __init__(self, grid_size, radius, too_far):
        super().__init__()
        reach = int(min(radius, grid_size - 1))  # in columns along a side
        self.tile = max(4, 2 * reach)
        self.beyond = -grid_size % self.tile  # columns that the last tiles lack
        number = torch.arange(1.0, grid_size**2 + 1)[None, None]  # 0 is outside the grid
        query = self.cut(number)[0, :, 0, :, None].long()  # (T, tile^2, 1)
        key = self.cut_windows(number)[0, :, 0, None].long()  # (T, 1, window^2)
        too_far = F.pad(too_far, (1, 0, 1, 0), value=True)[query, key]
        # Queries outside the grid attend to all: `join` drops the result, but it must be finite.
        self.register_buffer("too_far", too_far & (query > 0), persistent=False)
        self.register_buffer("itself", query == key, persistent=False)

    def cut(self, columns):
        """(B, c, n) -> (B, T, c, tile^2), tiles; zeros outside the grid."""
        return self._tiles(columns, 0).flatten(1, 2)

    def cut_windows(self, columns):
        """(B, c, n) -> (B, T, c, 4 tile^2), windows around tiles; zeros outside the grid."""
        tiles = self._tiles(columns, self.tile // 2)
        above, below = tiles[:, :-1], tiles[:, 1:]
        four = above[:, :, :-1], above[:, :, 1:], below[:, :, :-1], below[:, :, 1:]
        return torch.cat(four, -1).flatten(1, 2)

    def _tiles(self, columns, around):
        """(B, c, n) -> (B, rows, rows, c, tile^2), tiles of the grid with a border of zeros."""
        side = math.isqrt(columns.shape[2])
        low, high = around, around + self.beyond
        grid = F.pad(columns.unflatten(2, (side, side)), (low, high, low, high))
        grid = grid.unflatten(3, (-1, self.tile)).unflatten(2, (-1, self.tile))
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(4)

    def join(self, tiles):
        """(B, T, c, tile^2) -> (B, c, n)."""
        rows, inside = math.isqrt(tiles.shape[1]), self.tile * math.isqrt(tiles.shape[1])
        grid = tiles.unflatten(3, (self.tile, self.tile)).unflatten(1, (rows, rows))
        grid = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        inside -= self.beyond
        return grid[:, :, :inside, :inside].flatten(2)

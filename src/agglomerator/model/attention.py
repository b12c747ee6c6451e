"""Consensus: attention among the columns of an image."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from agglomerator.util.precision import upcast, without_autocast

SELF_SCORE = -5e-4


def distances(grid_size):
    """Distances between the columns of a grid: (n, n) float64, exact where they are integers."""
    side = torch.arange(grid_size, dtype=torch.float64)
    place = torch.cartesian_prod(side, side)  # (n, 2), row-major
    return torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")


class ConsensusAttention(nn.Module):
    """Attention among the columns of an image, for each level apart, without learned projections.

    q = L, key = L / |L|, value = L; a column's score with itself is -5e-4 unless `consensus_self`;
    with a radius r > 0, which may be a fraction, columns farther apart than r on the grid do not
    attend to each other. With a temperature t the score is the cosine of two columns over t,
    whatever their lengths: a step of mean shift (Comaniciu and Meer 2002) over directions, which
    draws like vectors together.
    """

    def __init__(self, grid_size, consensus_self=False, radius=0, temperature=None):
        super().__init__()
        self.consensus_self, self.radius, self.temperature = consensus_self, radius, temperature
        if radius > 0:
            self.register_buffer("non_local_mask", (distances(grid_size) > radius)[None])
            self.reach = int(min(radius, grid_size - 1))  # in columns along a side
            self.tile = min(grid_size, max(4, 2 * self.reach))
            self.beyond = -grid_size % self.tile  # columns that the last tiles lack
            number = torch.arange(1.0, grid_size**2 + 1)[None, None]  # 0 is outside the grid
            query, key = (self._windows(number, around)[0, :, 0] for around in (0, self.reach))
            query, key = query[..., None].long(), key[:, None].long()
            far = F.pad(self.non_local_mask[0], (1, 0, 1, 0), value=True)[query, key]
            # Tiles may reach beyond the grid: what is computed there is not used, but finite.
            self.register_buffer("too_far", far & (query > 0), persistent=False)
            self.register_buffer("itself", query == key, persistent=False)

    def forward(self, level):
        """(d, B, n) -> (d, B, n)."""
        agree = self._agree_near if self.radius > 0 else self._agree
        value = level.transpose(0, 1).contiguous()  # (B, d, n)
        # The weights of a column sum to 1, so that the mean of all columns passes unchanged. Left
        # out of the product, it leaves columns that are equal, or nearly so, free of rounding
        # noise, which each norm over columns would magnify, by up to 1 / sqrt(eps).
        mean = value.mean(2, keepdim=True)
        return (mean + agree(value, value - mean)).transpose(0, 1)

    def _query(self, value):
        if self.temperature is None:
            return value
        return F.normalize(value, dim=1) * (math.sqrt(value.shape[1]) / self.temperature)

    def _key(self, value):
        """L / (|L| sqrt(d))."""
        wide = upcast(value)
        squares = wide.square().sum(1, keepdim=True)
        return (wide * (squares * value.shape[1]).rsqrt()).to(value.dtype)

    def _scores(self, query, key):
        """(..., d, n), (..., d, m) -> (..., n, m)."""
        if self.temperature is None:
            return query.mT @ key
        with without_autocast(query.device):  # a low temperature magnifies rounding errors
            return upcast(query).mT @ upcast(key)

    def _attend(self, query, key, deviation, itself, too_far=None):
        """Means of the columns' deviations by softmax of their scores.

        (..., d, n), (..., d, m), (..., d, m), masks (..., n, m) -> (..., d, n).
        """
        scores = self._scores(query, key)
        if not self.consensus_self:
            scores = scores.masked_fill(itself, SELF_SCORE)
        if too_far is not None:
            scores = scores.masked_fill(too_far, -math.inf)
        return deviation @ scores.softmax(-1).to(deviation.dtype).mT

    def _agree(self, value, deviation):
        """Every column attends to all: (B, d, n), (B, d, n) -> (B, d, n)."""
        itself = torch.eye(value.shape[2], dtype=torch.bool, device=value.device)
        return self._attend(self._query(value), self._key(value), deviation, itself)

    def _agree_near(self, value, deviation):
        """The same within the radius. Square tiles of columns attend to the windows around them:
        the work grows with n, not with n * n."""
        side = math.isqrt(value.shape[2])
        query = self._windows(self._query(value), 0)
        key, near = (self._windows(x, self.reach) for x in (self._key(value), deviation))
        agreed = self._attend(query, key, near, self.itself, self.too_far)
        tiles = agreed.flatten(2).mT  # (B, d * tile * tile, T)
        grid = F.fold(tiles, side + self.beyond, self.tile, stride=self.tile)
        return grid[:, :, :side, :side].flatten(2)

    def _windows(self, columns, around):
        """(B, c, n) -> (B, T, c, w * w): T tiles, each with `around` columns more on every side."""
        c, side = columns.shape[1], math.isqrt(columns.shape[2])
        grid = F.pad(columns.unflatten(2, (side, side)), (0, self.beyond) * 2)
        width = self.tile + 2 * around
        windows = F.unfold(grid, width, padding=around, stride=self.tile)
        return windows.mT.unflatten(2, (c, -1))

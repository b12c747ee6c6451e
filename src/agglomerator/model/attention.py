"""Consensus: attention among the columns of an image."""

import math

import torch
from torch import nn

from agglomerator.model.local_attention import Tiles
from agglomerator.util.precision import upcast, without_autocast

SELF_SCORE = -5e-4


def distances(grid_size):
    """Distances between the columns of a grid: (n, n) float64, exact where they are integers."""
    side = torch.arange(grid_size, dtype=torch.float64)
    place = torch.cartesian_prod(side, side)  # (n, 2), row-major
    return torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")


class ConsensusAttention(nn.Module):
    """Attention among the columns of one level, without learned projections.

    q = L, key = L / |L|, value = L; score(i, j) = q_i . key_j / sqrt(d). Unless `consensus_self`,
    the score of a column with itself is -5e-4. With a radius > 0, which may be a fraction, columns
    farther apart than that on the grid do not attend to each other. With a temperature, the score
    is the cosine of two columns over it: a step of mean shift (Comaniciu and Meer 2002) over
    directions, which draws like vectors together.
    """

    def __init__(self, grid_size, consensus_self=False, radius=0, temperature=None):
        super().__init__()
        self.consensus_self, self.temperature = consensus_self, temperature
        too_far = (distances(grid_size) > radius)[None] if radius > 0 else None  # (1, n, n)
        self.register_buffer("non_local_mask", too_far)
        self.tiles = Tiles(grid_size, radius, too_far[0]) if radius > 0 else None

    def plain(self, level):
        """The equations: (d, B, n) -> (d, B, n)."""
        value = level.transpose(0, 1)  # (B, d, n)
        weights = self._weights(*self._query_key(value), self.non_local_mask)  # (B, n, n)
        return (value @ weights.mT).transpose(0, 1)

    def forward(self, level):
        """The same as `plain`, more exact, and faster within a radius.

        The weights of a column sum to 1, so the mean of all columns passes unchanged. Left out of
        the product, it leaves columns that are equal, or nearly so, free of rounding noise, which
        each norm over columns would magnify by up to 1 / sqrt(eps).
        """
        value = level.transpose(0, 1).contiguous()  # (B, d, n)
        mean = value.mean(2, keepdim=True)
        query, key = self._query_key(value)
        if self.tiles is None:
            agreed = (value - mean) @ self._weights(query, key).mT
        else:
            tiles, cut, windows = self.tiles, self.tiles.cut, self.tiles.cut_windows
            weights = self._weights(cut(query), windows(key), tiles.too_far, tiles.itself)
            agreed = tiles.join(windows(value - mean) @ weights.mT)
        return (mean + agreed).transpose(0, 1)

    def _query_key(self, value):
        """L, or L sqrt(d) / (|L| temperature); and L / (|L| sqrt(d))."""
        wide, d = upcast(value), value.shape[1]
        key = (wide * (wide.square().sum(1, keepdim=True) * d).rsqrt()).to(value.dtype)
        return (value if self.temperature is None else key * (d / self.temperature)), key

    def _weights(self, query, key, too_far=None, itself=None):
        """Softmax of the scores over j: (..., d, i), (..., d, j) -> (..., i, j). So are the masks
        of columns too far apart, None if none are, and of a column with itself, None for equal
        i and j."""
        if self.temperature is None:
            scores = query.mT @ key
        else:
            with without_autocast(query.device):  # a low temperature magnifies rounding errors
                scores = upcast(query).mT @ upcast(key)
        if itself is None:
            itself = torch.eye(query.shape[-1], dtype=torch.bool, device=query.device)
        if not self.consensus_self:
            scores = scores.masked_fill(itself, SELF_SCORE)
        if too_far is not None:
            scores = scores.masked_fill(too_far, -math.inf)
        return scores.softmax(-1).to(key.dtype)

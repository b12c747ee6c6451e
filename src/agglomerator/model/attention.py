"""Consensus: attention among the columns of an image."""

import math

import torch
from torch import nn

from agglomerator.model.tiles import Tiles
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
        itself = None if radius > 0 else torch.eye(grid_size**2, dtype=torch.bool)
        self.register_buffer("itself", itself, persistent=False)

    def plain(self, level):
        """The equations: (d, B, n) -> (d, B, n)."""
        value = level.transpose(0, 1)  # (B, d, n)
        return (value @ self.weights(level).mT).transpose(0, 1)

    def weights(self, level, column=None):
        """How much each column attends to every other: (d, B, n) -> (B, n, n), rows sum to 1; of
        one column alone, by its number, (B, 1, n)."""
        query, key = self._query_key(level.transpose(0, 1))  # (B, d, n)
        too_far = self.non_local_mask
        if column is None:
            return self._weights(query, key, too_far)
        row = slice(column, column + 1)
        itself = torch.arange(key.shape[-1], device=key.device)[None] == column  # (1, n)
        too_far = None if too_far is None else too_far[:, row]
        return self._weights(query[..., row], key, too_far, itself)

    def forward(self, level):
        """The same as `plain`, more exact, and faster: (..., d, B, n) -> (..., d, B, n).

        The weights of a column sum to 1, so the mean of all columns passes unchanged. Left out of
        the product, it leaves columns that are equal, or nearly so, free of rounding noise, which
        each norm over columns would magnify by up to 1 / sqrt(eps). Nor does a gradient pass it.
        """
        value = level.transpose(-3, -2)
        shape = value.shape
        value = value.reshape(-1, *shape[-2:])  # (B, d, n)
        mean = value.detach().mean(2, keepdim=True)
        if self.tiles is None:
            agreed = (value - mean) @ self._weights_of_all(value).mT
        else:
            tiles, cut, windows = self.tiles, self.tiles.cut, self.tiles.cut_windows
            query, key = self._query_key(value)
            weights = self._weights(cut(query), windows(key), tiles.too_far, tiles.itself)
            agreed = tiles.join(windows(value - mean) @ weights.mT)
        return (mean + agreed).view(shape).transpose(-3, -2)

    def _weights_of_all(self, value):
        """The same as `_weights`, of all columns for all: the products of the columns with each
        other, (B, n, n), hold their norms too."""
        d = value.shape[1]
        if self.temperature is None:
            products = value.mT @ value
        else:
            with without_autocast(value.device):
                products = upcast(value).mT @ upcast(value)
        norm = (upcast(products.diagonal(dim1=1, dim2=2)) * d).rsqrt()  # its inverse, (B, n)
        scores = products * norm[:, None]
        if self.temperature is not None:
            scores = scores * (norm[:, :, None] * (d / self.temperature))
        if not self.consensus_self:
            scores = scores.masked_fill(self.itself, SELF_SCORE)
        return scores.softmax(-1).to(value.dtype)

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

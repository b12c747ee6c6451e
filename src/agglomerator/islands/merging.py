"""Islands by merging: neighbouring islands join as long as what they lose by it is little.

A chain of neighbours that each agree with the next can lead from one object to another. Ward's
criterion (1963, "Hierarchical grouping to optimize an objective function") asks instead how far the
vectors of two islands, taken together, are from their common mean, and so weighs large islands more
than specks.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from agglomerator.islands.components import label_components
from agglomerator.util.precision import upcast

MIXER = 0x1E3779B97F4A7C15  # odd: multiplied by it, modulo 2^64, every number becomes another
COARSER = 4  # how much more the merges of a level may lose than those of the level below it


def merged(states, loss):
    """Label every column with its island, level by level.

    Vectors are brought to unit length. At first every column is an island. Of islands that touch,
    those merge whose merge adds least to the sum of squared distances from the means of islands, as
    long as it adds no more than `loss` times the number of columns; on each level below the top, a
    quarter of that on the level above, since parts are smaller than wholes.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.
        loss: the share, at the top level.

    Returns:
        Labels (..., K, S, S) int64, on the CPU. The label of an island is the index, row-major, of
        its first column.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])[:, None]  # 2 x 2, one level
        >>> merged(states, 0.1)
        tensor([[[0, 0],
                 [2, 0]]])
    """
    return MergeTrees(states).cut(loss)


class MergeTrees:
    """All merges of the islands of states, one tree for each level of each image. They are found
    once and cut at any loss, in far less time.

    Args:
        states: as for `merged`.
    """

    def __init__(self, states):
        *batch, n, n_levels, d = states.shape
        side = math.isqrt(n)
        self.shape = *batch, n_levels, side, side
        vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3).reshape(-1, n, d)
        self.pairs, self.added = (x.cpu().numpy() for x in merges(vectors, side))

    def cut(self, loss):
        """The labels that `merged` returns."""
        n_levels, side = self.shape[-3:-1]
        level = self.pairs[0] // side**2 % n_levels
        done = self.added <= loss / COARSER ** (n_levels - 1.0 - level) * side**2
        return label_components(*self.pairs[:, done], self.shape)

    def cut_into(self, number):
        """Labels as those of `merged`, with so many islands on each level."""
        n = self.shape[-1] ** 2
        tree = self.pairs[0] // n
        in_order = np.lexsort((self.added, tree))  # stable: a merge comes after those within it
        rank = np.empty(len(tree), int)
        rank[in_order] = np.arange(len(tree)) % (n - 1)
        return label_components(*self.pairs[:, rank < n - number], self.shape)


def merges(vectors, side):
    """The merges of the columns of many images by Ward's criterion, until each image is one island.

    In each round all islands merge that are each other's cheapest neighbours, in all images at
    once. Without a grid this would be the tree of the least costly merge first (reciprocal nearest
    neighbours: Murtagh, "A survey of recent advances in hierarchical clustering algorithms", 1983);
    as only neighbours merge, the order of far merges may differ from that.

    Args:
        vectors: (N, n, d), n = side * side columns, row-major.

    Returns:
        Pairs of columns (2, N * (n - 1)), numbered through all images, whose islands merge; and the
        height of each merge (N * (n - 1)): what it adds to the sum of squares, but no less than a
        merge inside it added.
    """
    n_images, n, _ = vectors.shape
    total, means = n_images * n, vectors.flatten(0, 1).clone()
    sizes, heights = means.new_ones(total), means.new_zeros(total)
    island = torch.arange(total, device=means.device)  # of each column, its first; islands merge
    edges, found = _neighbours(island.view(n_images, side, side)), []
    while edges.numel():
        one, other = edges
        share = sizes[one] * sizes[other] / (sizes[one] + sizes[other])
        difference = means.index_select(0, one) - means.index_select(0, other)
        cost = share * difference.square_().sum(1)
        cost = cost.nan_to_num(torch.finfo(cost.dtype).max)  # of no number, but it must end
        cheapest = _cheapest(edges, cost, total)
        one, other, cost = one[cheapest], other[cheapest], cost[cheapest]
        weight = sizes[other] / (sizes[one] + sizes[other])
        means[one] = means[one].lerp(means[other], weight[:, None])
        sizes[one] += sizes[other]
        heights[one] = cost.maximum(heights[one]).maximum(heights[other])
        found.append((torch.stack((one, other)), heights[one]))
        island[other] = one
        one, other = island[edges]
        key = torch.unique(torch.minimum(one, other) * total + torch.maximum(one, other))
        edges = torch.stack((key // total, key % total))
        edges = edges[:, edges[0] != edges[1]]
    if not found:  # one column
        return edges, heights[:0]
    return torch.cat([pairs for pairs, _ in found], 1), torch.cat([added for _, added in found])


def _neighbours(places):
    """Pairs of neighbours (2, M) on grids of places (N, S, S)."""
    right = torch.stack((places[:, :, :-1], places[:, :, 1:])).flatten(1)
    down = torch.stack((places[:, :-1], places[:, 1:])).flatten(1)
    return torch.cat((right, down), 1)


def _cheapest(edges, cost, total):
    """Which of the pairs (2, M) are the cheapest of both their islands, of `total`. Of those that
    cost as much, a number made from both islands decides, so that not all lean to one side."""
    among, mixed = edges.flatten(), (edges[0] * total + edges[1]) * MIXER
    chosen = None
    for value in cost, mixed:
        value = value.repeat(2)
        greatest = torch.finfo if value.is_floating_point() else torch.iinfo
        if chosen is not None:
            value = value.where(chosen, greatest(value.dtype).max)
        least = value.new_full((total,), greatest(value.dtype).max)
        is_least = value == least.scatter_reduce(0, among, value, "amin")[among]
        chosen = is_least if chosen is None else chosen & is_least
    return chosen.view(2, -1).all(0)

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
from sklearn.cluster import ward_tree
from sklearn.feature_extraction.image import grid_to_graph

from agglomerator.islands.clusters import after
from agglomerator.util.precision import upcast

COARSER = 4  # how much more the merges of a level may lose than those of the level below it


def merged(states, loss):
    """Label every column with its island, level by level.

    Vectors are brought to unit length. At first every column is an island. Of all islands that
    touch, those two merge whose merge adds least to the sum of squared distances from the means of
    islands, as long as it adds no more than `loss` times the number of columns; on each level below
    the top, a quarter of that on the level above, since parts are smaller than wholes.

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
    """All merges of the islands of states, the least costly first, one tree for each level of each
    image. They are found once and cut at any loss, in far less time.

    Args:
        states: as for `merged`.
    """

    def __init__(self, states):
        *batch, n, n_levels, d = states.shape
        side = math.isqrt(n)
        self.shape = *batch, n_levels, side, side
        vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3).reshape(-1, n, d)
        self.trees = [_tree(level, side) for level in vectors.cpu().double().numpy()]

    def cut(self, loss):
        """The labels that `merged` returns."""
        n_levels, side = self.shape[-3:-1]
        found = np.empty((len(self.trees), side**2), np.int64)
        for i, (children, added) in enumerate(self.trees):
            most = loss / COARSER ** (n_levels - 1 - i % n_levels) * side**2
            island = after(children, np.flatnonzero(added <= most))
            _, first, island = np.unique(island, return_index=True, return_inverse=True)
            found[i] = first[island]
        return torch.from_numpy(found).view(self.shape)


def _tree(vectors, side):
    """The merges (n - 1, 2) of vectors (n, d), and what each adds to the sum of squares."""
    if side == 1:
        return np.empty((0, 2), int), np.empty(0)
    children, _, _, _, distances = ward_tree(
        vectors, connectivity=grid_to_graph(side, side), return_distance=True
    )
    return children, distances**2 / 2  # scikit-learn's distance has a factor of 2

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
    *batch, n, n_levels, d = states.shape
    side = math.isqrt(n)
    vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3).reshape(-1, n_levels, n, d)
    most = [loss / COARSER ** (n_levels - 1 - k) for k in range(n_levels)]
    found = np.empty(vectors.shape[:3], np.int64)
    for labels, levels in zip(found, vectors.cpu().double().numpy(), strict=True):
        for k, level in enumerate(levels):
            labels[k] = _merge(level, side, most[k] * n)
    return torch.from_numpy(found).view(*batch, n_levels, side, side)


def _merge(vectors, side, most):
    """Labels (n,) of vectors (n, d); no merge adds more than `most` to the sum of squares."""
    n = len(vectors)
    if n == 1:
        return np.zeros(1, np.int64)
    children, _, _, _, distances = ward_tree(
        vectors, connectivity=grid_to_graph(side, side), return_distance=True
    )
    done = np.flatnonzero(distances**2 / 2 <= most)  # scikit-learn's distance has a factor of 2
    _, first, island = np.unique(after(children, done), return_index=True, return_inverse=True)
    return first[island]

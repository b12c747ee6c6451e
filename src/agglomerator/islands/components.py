"""Islands as connected components of the grid of columns."""

import math

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def label_components(starts, ends, shape):
    """Label the columns of many grids by what joins them.

    Args:
        starts, ends: (M,) integers, pairs of columns, counted row by row through all grids.
        shape: (..., S, S).

    Returns:
        Labels (..., S, S) int64, on the CPU. The label of an island is the index, row-major, of its
        first column.

    Example:
        >>> import numpy as np
        >>> label_components(np.array([0, 1]), np.array([1, 3]), (2, 2))
        tensor([[0, 0],
                [2, 0]])
    """
    total = math.prod(shape)
    graph = coo_array((np.ones(len(starts), np.int8), (starts, ends)), shape=(total, total))
    n_components, components = connected_components(graph, directed=False)
    first = np.empty(n_components, np.int64)
    first[components[::-1]] = np.arange(total)[::-1]  # of equal indices the last one counts
    return torch.from_numpy(first[components].reshape(shape) % (shape[-1] * shape[-2]))

"""Islands of agreement: which columns form them, how large they are, whether they are parts.

An island of a level is a set of columns that neighbours connect, each beside, above or below the
next, whose vectors agree: their cosine is at least a threshold. Every function here is a pure
function of states (..., n, K, d) as `Agglomerator.states` returns them, of labels, and of masks.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from agglomerator.util.precision import upcast


def neighbour_cosines(states):
    """Cosines of neighbouring columns.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.

    Returns:
        Of columns beside each other (..., K, S, S - 1), above each other (..., K, S - 1, S).
    """
    vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3)  # (..., K, n, d)
    side = math.isqrt(vectors.shape[-2])
    grid = vectors.unflatten(-2, (side, side))
    beside = (grid[..., :, 1:, :] * grid[..., :, :-1, :]).sum(-1)
    above = (grid[..., 1:, :, :] * grid[..., :-1, :, :]).sum(-1)
    return beside, above


def agreement(beside, above):
    """Mean cosine of neighbours, from what `neighbour_cosines` returns: (..., K).

    1 where there is one column only.
    """
    if not beside.shape[-1]:
        return beside.new_ones(beside.shape[:-2])
    return torch.cat((beside.flatten(-2), above.flatten(-2)), -1).mean(-1)


def connect(beside, above):
    """Islands of columns on grids, from which neighbours are connected.

    Args:
        beside: (..., S, S - 1) bool, each column with the next to its right.
        above: (..., S - 1, S) bool, each column with the next below it.

    Returns:
        (..., S, S) int64. The label of an island is the number, row-major, of its first column.
    """
    shape = (*beside.shape[:-1], beside.shape[-2])
    columns = np.arange(math.prod(shape)).reshape(shape)
    beside, above = beside.cpu().numpy(), above.cpu().numpy()
    starts = np.concatenate((columns[..., :-1][beside], columns[..., :-1, :][above]))
    ends = np.concatenate((columns[..., 1:][beside], columns[..., 1:, :][above]))
    graph = coo_array(
        (np.ones(len(starts), np.int8), (starts, ends)), shape=(columns.size, columns.size)
    )
    n_islands, found = connected_components(graph, directed=False)
    first = np.empty(n_islands, np.int64)
    first[found[::-1]] = columns.ravel()[::-1]  # of equal indices the last one counts
    n_columns = shape[-1] * shape[-2]
    return torch.from_numpy(first[found].reshape(shape) % n_columns)


def islands(states, threshold):
    """The islands of every level.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.
        threshold: least cosine of neighbours that agree.

    Returns:
        Labels (..., K, S, S) int64, on the CPU. The label of an island is the number, row-major,
        of its first column.
    """
    return connect(*(cosines >= threshold for cosines in neighbour_cosines(states)))


def count(labels):
    """Number of islands, and share of columns in islands larger than one.

    Args:
        labels: (..., S, S) int64, from 0 to S * S - 1.

    Returns:
        Two tensors (...,), float32.
    """
    labels = labels.flatten(-2)
    sizes = torch.zeros_like(labels).scatter_add_(-1, labels, torch.ones_like(labels))
    inside = 1 - (sizes == 1).float().sum(-1) / labels.shape[-1]
    return (sizes > 0).float().sum(-1), inside


def to_pixels(labels, height, width):
    """Labels of columns (..., S, S) -> of the pixels that they stand for, (..., height, width)."""
    side = labels.shape[-1]
    rows = torch.arange(height, device=labels.device) * side // height
    columns = torch.arange(width, device=labels.device) * side // width
    return labels[..., rows[:, None], columns]

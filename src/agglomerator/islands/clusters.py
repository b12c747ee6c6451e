"""The vectors of a level clustered into a given number of segments.

Other papers on such networks report clusters that are told the true number of segments (Miyato et
al. 2025, "Artificial Kuramoto Oscillatory Neurons"). Islands are told a threshold instead.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from agglomerator.util.precision import upcast


def average_linkage(vectors):
    """The merges of agglomerative clustering, average linkage on the cosine distance.

    They are those of scikit-learn's `AgglomerativeClustering`, which would begin anew for every
    number of clusters.

    Args:
        vectors: (n, d).

    Returns:
        (n - 1, 2) integers, in the order of merging: vectors are 0 to n - 1, what merge i makes is
        n + i.
    """
    unit = F.normalize(upcast(vectors), dim=-1)
    if len(unit) == 1:
        return np.empty((0, 2), int)
    distances = (1 - unit @ unit.T).clamp_(min=0).cpu().numpy()
    return linkage(squareform(distances, checks=False), "average")[:, :2].astype(int)


def cut(merges, number):
    """The clusters before the last merges.

    Args:
        merges: (n - 1, 2), from `average_linkage`.
        number: of clusters; at most n are made.

    Returns:
        (n,) labels from 0.

    Example:
        >>> import torch
        >>> cut(average_linkage(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]])), 2).tolist()
        [0, 1, 0]
    """
    done = np.arange(len(merges))[: max(len(merges) + 1 - number, 0)]
    return np.unique(after(merges, done), return_inverse=True)[1]


def after(merges, done):
    """Labels (n,) after some of the merges (n - 1, 2), whose indices are `done`."""
    n = len(merges) + 1
    edges = np.repeat(n + done, 2), merges[done].ravel()
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(2 * n, 2 * n))
    return connected_components(graph, directed=False)[1][:n]


def cluster(states, numbers):
    """Cluster the columns of images, level by level, into given numbers of clusters.

    Args:
        states: (B, n, K, d), n = S * S columns, row-major.
        numbers: a list of (B,) integers: each gives every image a number of clusters.

    Returns:
        For each of `numbers`, labels (B, K, S, S) int64.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])[None, :, None]
        >>> cluster(states, [torch.tensor([2])])[0].tolist()
        [[[[0, 0], [1, 0]]]]
    """
    n_images, n, n_levels, _ = states.shape
    found = np.empty((len(numbers), n_images, n_levels, n), np.int64)
    for i, image in enumerate(states.transpose(1, 2)):
        for k, vectors in enumerate(image):
            merges = average_linkage(vectors)
            for each, number in zip(found, numbers, strict=True):
                each[i, k] = cut(merges, int(number[i]))
    side = round(n**0.5)
    return list(torch.from_numpy(found).unflatten(-1, (side, side)))

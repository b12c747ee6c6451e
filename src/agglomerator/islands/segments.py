"""The islands of a level: segmentation of a grid of columns by the cosine of neighbours.

An island is a connected component of the grid (Hinton 2021, arXiv 2102.12627, "islands of
agreement"). Two columns side by side, or one above the other, are connected if the cosine of their
vectors is at least a threshold. Every function here is pure: it takes states (..., n, K, d) as
`Agglomerator.states` returns them, or labels, and returns tensors.
"""

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from agglomerator.islands.components import label_components
from agglomerator.islands.merging import MergeTrees
from agglomerator.util.precision import upcast

ROUNDING = 1e-6  # by so much the cosine of two equal vectors may fall short of 1


def neighbour_cosines(states):
    """Cosines of the vectors of neighbouring columns.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.

    Returns:
        (horizontal, vertical): each column with the next to its right, (..., K, S, S - 1), and with
        the next below it, (..., K, S - 1, S).

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])[:, None]  # 2 x 2, one level
        >>> neighbour_cosines(states)
        (tensor([[[1.],
                 [0.]]]), tensor([[[0., 1.]]]))
    """
    vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3)  # (..., K, n, d)
    side = math.isqrt(vectors.shape[-2])
    grid = vectors.unflatten(-2, (side, side))
    horizontal = (grid[..., :, 1:, :] * grid[..., :, :-1, :]).sum(-1)
    vertical = (grid[..., 1:, :, :] * grid[..., :-1, :, :]).sum(-1)
    return horizontal, vertical


def mean_cosine(horizontal, vertical):
    """Mean of what `neighbour_cosines` returns: (..., K). It is 1 for a single column.

    Example:
        >>> import torch
        >>> mean_cosine(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0, 1.0]]]))
        tensor([0.5000])
    """
    if not horizontal.shape[-1]:
        return horizontal.new_ones(horizontal.shape[:-2])
    return torch.cat((horizontal.flatten(-2), vertical.flatten(-2)), -1).mean(-1)


def total_variation(states):
    """Total variation of the directions of a level: mean over neighbouring columns of the distance
    of their unit vectors, 0 where all agree, 2 where all neighbours are opposite.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.

    Returns:
        (..., K). It is 0 for a single column.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])[:, None]  # 2 x 2, one level
        >>> total_variation(states)  # neighbours: 2 agree, 2 are orthogonal
        tensor([0.7071])
    """
    vectors = F.normalize(upcast(states), dim=-1).movedim(-2, -3)  # (..., K, n, d)
    side = math.isqrt(vectors.shape[-2])
    grid = vectors.unflatten(-2, (side, side))
    steps = [grid.diff(dim=axis).norm(dim=-1).flatten(-2) for axis in (-2, -3)]
    steps = torch.cat(steps, -1)
    return steps.sum(-1) / max(steps.shape[-1], 1)


def connected(horizontal, vertical):
    """Connected components of grids of columns.

    Args:
        horizontal: (..., S, S - 1) bool, whether a column is connected with the next to its right.
        vertical: (..., S - 1, S) bool, whether a column is connected with the next below it.

    Returns:
        Labels (..., S, S) int64, on the CPU. The label of an island is the index, row-major, of its
        first column.

    Example:
        >>> import torch
        >>> connected(torch.tensor([[True], [False]]), torch.tensor([[False, True]]))
        tensor([[0, 0],
                [2, 0]])
    """
    shape = (*horizontal.shape[:-1], horizontal.shape[-2])
    columns = np.arange(math.prod(shape)).reshape(shape)
    horizontal, vertical = horizontal.cpu().numpy(), vertical.cpu().numpy()
    starts = np.concatenate((columns[..., :-1][horizontal], columns[..., :-1, :][vertical]))
    ends = np.concatenate((columns[..., 1:][horizontal], columns[..., 1:, :][vertical]))
    return label_components(starts, ends, shape)


def segment(states, threshold, loss=None):
    """Label every column with its island, level by level.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.
        threshold: least cosine of connected neighbours.
        loss: if given, islands come from `merging.merged` instead, which may lose so much.

    Returns:
        Labels (..., K, S, S) int64, on the CPU. The label of an island is the index, row-major, of
        its first column.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])[:, None]  # 2 x 2, one level
        >>> segment(states, 0.8)
        tensor([[[0, 0],
                 [2, 0]]])
    """
    return Segmenter(states).segment(threshold, loss)


class Segmenter:
    """Segments the same states by one threshold or loss after another: what these share is found
    once.

    Args:
        states: (..., n, K, d), n = S * S columns, row-major.
    """

    def __init__(self, states):
        self.states = states

    @cached_property
    def _cosines(self):
        return neighbour_cosines(self.states)

    @cached_property
    def _trees(self):
        return MergeTrees(self.states)

    def segment(self, threshold, loss=None):
        """The labels that the function `segment` returns."""
        if loss is not None:
            return self._trees.cut(loss)
        least = min(threshold, 1 - ROUNDING)
        return connected(*(cosines >= least for cosines in self._cosines))


def count(labels):
    """Number of islands, and share of the columns in islands of two columns or more.

    Args:
        labels: (..., S, S) int64, from 0 to S * S - 1.

    Returns:
        (number, inside), each (...,) float32.

    Example:
        >>> import torch
        >>> count(torch.tensor([[0, 0], [2, 0]]))
        (tensor(2.), tensor(0.7500))
    """
    labels = labels.flatten(-2)
    sizes = torch.zeros_like(labels).scatter_add_(-1, labels, torch.ones_like(labels))
    inside = 1 - (sizes == 1).float().sum(-1) / labels.shape[-1]
    return (sizes > 0).float().sum(-1), inside


def to_pixels(labels, height, width):
    """Enlarge labels of columns to labels of pixels, by nearest neighbour.

    Args:
        labels: (..., S, S).
        height, width: of the image, in pixels.

    Returns:
        (..., height, width).

    Example:
        >>> import torch
        >>> to_pixels(torch.tensor([[0, 1], [2, 3]]), 2, 4)
        tensor([[0, 0, 1, 1],
                [2, 2, 3, 3]])
    """
    side = labels.shape[-1]
    rows = torch.arange(height, device=labels.device) * side // height
    columns = torch.arange(width, device=labels.device) * side // width
    return labels[..., rows[:, None], columns]

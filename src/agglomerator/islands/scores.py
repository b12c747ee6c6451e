"""Scores of islands: number, size, fit to true segments, and what position alone explains."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics import Metric

from agglomerator.data.masks import MASKS, NOWHERE
from agglomerator.islands.clusters import cluster
from agglomerator.islands.segments import (
    count,
    mean_cosine,
    neighbour_cosines,
    segment,
    to_pixels,
    total_variation,
)
from agglomerator.util.errors import UserError
from agglomerator.util.precision import upcast

COLUMN_SCORES = "cosine", "total_variation", "number", "inside"
MASK_SCORES = tuple(f"{mask}_{score}" for mask in MASKS for score in ("ari", "iou"))
CLUSTER_SCORES = tuple(f"clustered_{score}" for score in MASK_SCORES)
SCORES = *COLUMN_SCORES, *MASK_SCORES, *CLUSTER_SCORES


def check_masks(masks, n_images):
    """Raises UserError unless masks, arrays by name, are such as `against_mask` takes, square, one
    for each of `n_images`."""
    for name, mask in masks.items():
        values = torch.as_tensor(mask).cpu().numpy()
        shape = values.shape
        if name not in MASKS:
            raise UserError(f"masks[{name!r}]: name them {' or '.join(map(repr, MASKS))}.")
        if len(shape) != 3 or shape[0] != n_images or shape[1] != shape[2]:
            raise UserError(
                f"masks[{name!r}]: of shape {shape}; give ({n_images}, S, S), the middle square of "
                "each image."
            )
        whole = values.dtype.kind in "bui"
        if not whole or values.min(initial=0) < 0 or values.max(initial=0) > NOWHERE:
            raise UserError(
                f"masks[{name!r}]: give integers, 0 for background, 1 to 254 for segments, 255 for "
                "pixels to ignore."
            )


def against_mask(labels, mask):
    """How well a segmentation of images fits the true one.

    Two scores. The adjusted Rand index (Hubert and Arabie 1985) of the foreground pixels is 1 for
    the true segments and about 0 for random ones. The mean best intersection over union takes for
    every true segment the predicted one that fits it best, counts all pixels, and is the mean over
    the true segments. Libraries score one image at a time, as scikit-learn's `adjusted_rand_score`,
    and have no mean best intersection over union.

    Args:
        labels: (B, S, S) integers from 0, enlarged to the mask's size by nearest neighbour.
        mask: (B, H, W) integers: 0 background; 1 to 254 true segments; 255 counts nowhere, neither
            in a segment nor in a union.

    Returns:
        (ari, iou), each (B,) float64, on the CPU. ari is NaN for an image with fewer than two true
        segments, iou for one with none.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]]])
        >>> ari, iou = against_mask(torch.tensor([[[0, 1], [2, 3]]]), mask)
        >>> ari.item(), iou.item()
        (1.0, 1.0)
    """
    labels, mask = labels.cpu().long(), torch.as_tensor(mask).cpu().long()
    labels, counts = to_pixels(labels, *mask.shape[1:]), mask != NOWHERE
    n_images, n_predicted, n_true = len(mask), int(labels.max()) + 1, NOWHERE
    image = torch.arange(n_images)[:, None, None]
    pixels = ((image * n_predicted + labels) * n_true + mask)[counts].numpy()
    # Of all pairs of a label and a segment few occur: a table of all would be large.
    cells, both = np.unique(pixels, return_counts=True)
    predicted, cell = np.unique(cells // n_true, return_inverse=True)
    image, segment = cells // n_true // n_predicted, cells % n_true
    inside = segment > 0
    sizes = np.bincount(cell, both)  # of predicted segments
    foreground = np.bincount(cell, both * inside)
    true_sizes = np.bincount(image * n_true + segment, both, n_images * n_true)
    true_sizes = true_sizes.reshape(n_images, n_true)

    def of_images(image, values):
        return np.bincount(image, values, n_images)

    together = of_images(image, _pairs(both) * inside)
    in_predicted = of_images(predicted // n_predicted, _pairs(foreground))
    in_true = _pairs(true_sizes[:, 1:]).sum(1)
    n_segments = (true_sizes[:, 1:] > 0).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_chance = in_predicted * in_true / _pairs(true_sizes[:, 1:].sum(1))
        highest = (in_predicted + in_true) / 2
        ari = np.where(highest > by_chance, (together - by_chance) / (highest - by_chance), 1.0)
        ari[n_segments < 2] = np.nan
        fit = both / (sizes[cell] + true_sizes[image, segment] - both)
        best = np.zeros((n_images, n_true))
        np.maximum.at(best, (image, segment), fit)
        iou = best[:, 1:].sum(1) / n_segments
    return torch.from_numpy(ari), torch.from_numpy(iou)


def _pairs(n):
    return n * (n - 1) / 2


def numbers_of_segments(mask):
    """How many values each mask (B, H, W) has, the background among them, 255 not: (B,) int64."""
    return torch.tensor([int((each.unique() != NOWHERE).sum()) for each in torch.as_tensor(mask)])


def score_states(states, threshold, masks=None, told=False, loss=None):
    """Score the islands of images, level by level, each image for itself.

    Args:
        states: (B, n, K, d), n = S * S columns, row-major.
        threshold, loss: as for `segment`.
        masks: a dictionary of (B, H, W) with the keys "parts", "objects", or one of them, as for
            `against_mask`; None where the true segments are not known.
        told: score also the clusters of the vectors, as many as each mask has values (`cluster`).

    Returns:
        A dictionary of (B, K) tensors on the CPU: `cosine`, mean cosine of neighbours;
        `total_variation` of directions; `number` of islands; `inside`, share of columns in
        islands of two or more; with masks `parts_ari`, `parts_iou`, `objects_ari`, `objects_iou`;
        if told also `clustered_parts_ari`, ... NaN where an image has no such score.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]])[None, :, None]
        >>> mask = torch.tensor([[[1, 1], [2, 1]]])
        >>> scores = score_states(states, 0.8, {"parts": mask}, told=True)
        >>> {name: score.item() for name, score in scores.items() if "parts" in name}
        {'parts_ari': 1.0, 'parts_iou': 1.0, 'clustered_parts_ari': 1.0, 'clustered_parts_iou': 1.0}
    """
    cosines = neighbour_cosines(states)
    labels = segment(states, threshold, loss)
    scores = {"cosine": mean_cosine(*cosines), "total_variation": total_variation(states)}
    scores = {name: score.cpu() for name, score in scores.items()} | score_labels(labels, masks)
    if told and masks:
        numbers = [numbers_of_segments(mask) for mask in masks.values()]
        for (name, mask), found in zip(masks.items(), cluster(states, numbers), strict=True):
            fit = _fit(found, {name: mask})
            scores |= {f"clustered_{key}": score for key, score in fit.items()}
    return scores


def score_labels(labels, masks=None):
    """The scores of `score_states` that do not need vectors, of labels (B, K, S, S)."""
    number, inside = count(labels)
    return {"number": number, "inside": inside} | _fit(labels, masks or {})


def _fit(labels, masks):
    scores = {}
    for name, mask in masks.items():
        pairs = [against_mask(level, mask) for level in labels.unbind(1)]
        ari, iou = zip(*pairs, strict=True)
        scores |= {f"{name}_ari": torch.stack(ari, 1), f"{name}_iou": torch.stack(iou, 1)}
    return scores


class IslandScores(Metric):
    """Means over images of `score_states`, level by level.

    Args:
        levels: K.

    Example:
        >>> import torch
        >>> scores = IslandScores(levels=1)
        >>> scores.update(torch.tensor([[[[0, 0], [2, 0]]]]))
        >>> scores.compute()
        [{'number': 2.0, 'inside': 0.75, 'size': 2.0}]
    """

    full_state_update = False

    def __init__(self, levels):
        super().__init__()
        self.add_state("sums", torch.zeros(len(SCORES), levels), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(len(SCORES), levels), dist_reduce_fx="sum")
        self.columns = 0

    def update(self, labels, masks=None, scores=None):
        """Take in a batch of images.

        Args:
            labels: (B, K, S, S), from `segment`; None where `scores` has all.
            masks: as for `score_states`.
            scores: from `score_states`; None for those of the labels.
        """
        if scores is None:
            self.columns = labels.shape[-1] ** 2
            scores = score_labels(labels, masks)
        for i, name in enumerate(SCORES):
            if name in scores:
                values = scores[name].to(self.sums)
                self.sums[i] += values.nansum(0)
                self.images[i] += values.isfinite().sum(0)

    def update_states(self, states, threshold, masks=None, told=False, loss=None):
        """Take in the states (B, n, K, d) of a batch; the arguments are those of `score_states`."""
        self.columns = states.shape[1]
        self.update(None, scores=score_states(states, threshold, masks, told, loss))

    def compute(self):
        """The means, as a list with a dictionary for every level.

        Its keys are those of `score_states`, and `size`, columns an island. A score that is not
        known has no key.
        """
        means = (self.sums / self.images).mT.tolist()
        levels = []
        for values in means:
            named = zip(SCORES, values, strict=True)
            level = {name: value for name, value in named if not math.isnan(value)}
            if "number" in level:
                level["size"] = self.columns / level["number"]
            levels.append(level)
        return levels


class PositionShare:
    """The share of the variance of unit vectors that their place in the image explains, by level.

    It is the variance over places of the mean over images, divided by the variance over places and
    images. 1: all images have the same levels. 0: a place tells nothing. Of N images whose vectors
    are drawn at random it is 1/N.

    Example:
        >>> import torch
        >>> share = PositionShare()
        >>> share.update(torch.eye(4)[None, :, None].expand(3, -1, -1, -1))
        >>> share.compute()
        [1.0]
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.sums, self.squares, self.images = 0, 0, 0

    def update(self, states):
        """Take in the states (B, n, K, d) of a batch. The sums stay on their device."""
        unit = F.normalize(upcast(states.detach()), dim=-1)
        # Levels that hardly vary need it; Apple's GPUs do not have it.
        exact = torch.float32 if unit.device.type == "mps" else torch.float64
        self.sums = self.sums + unit.sum(0, dtype=exact)  # (n, K, d)
        self.squares = self.squares + unit.square().sum((0, 1, 3), dtype=exact)  # (K,)
        self.images += len(states)

    def compute(self):
        """A list with a number for each level; NaN where all vectors are equal."""
        at_place = self.sums.cpu().double() / self.images
        squares = self.squares.cpu().double() / (self.images * len(at_place))
        middle = at_place.mean(0).square().sum(-1)
        between = at_place.square().sum(-1).mean(0) - middle
        whole = squares - middle
        return (between / whole).where(whole > 1e-9, torch.nan).tolist()

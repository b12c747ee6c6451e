"""Scores of islands: how many there are, how large they are, how well they fit true segments."""

import math

import torch
from torchmetrics import Metric

from agglomerator.islands.segments import (
    connected,
    count,
    mean_cosine,
    neighbour_cosines,
    to_pixels,
)

COLUMN_SCORES = "cosine", "number", "inside"
MASKS = "parts", "objects"
MASK_SCORES = tuple(f"{mask}_{score}" for mask in MASKS for score in ("ari", "iou"))


def against_mask(labels, mask):
    """How well a segmentation of images fits the true one.

    Two scores. The adjusted Rand index (Hubert and Arabie 1985) of the foreground pixels is 1 for
    the true segments and about 0 for random ones. The mean best intersection over union takes for
    every true segment the predicted one that fits it best, counts all pixels, and is the mean over
    the true segments. Libraries score one image at a time, as scikit-learn's `adjusted_rand_score`,
    and have no mean best intersection over union.

    Args:
        labels: (B, S, S) integers from 0, enlarged to the mask's size by nearest neighbour.
        mask: (B, H, W) integers: 0 background; 1, 2, ... true segments.

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
    labels, mask = labels.cpu(), torch.as_tensor(mask).cpu().long()
    n_images, n_predicted, n_true = len(mask), int(labels.max()) + 1, int(mask.max()) + 1
    labels = to_pixels(labels, *mask.shape[1:])
    image = torch.arange(n_images)[:, None, None]
    cells = (image * n_predicted + labels) * n_true + mask
    shape = n_images, n_predicted, n_true
    table = cells.flatten().bincount(minlength=math.prod(shape)).view(shape).double()

    both, sizes, true_sizes = table[..., 1:], table.sum(2), table[..., 1:].sum(1)
    visible = true_sizes > 0
    in_foreground, foreground = both.sum(2), true_sizes.sum(1)
    together, predicted, true, all_pairs = (
        _pairs(x).flatten(1).sum(1) for x in (both, in_foreground, true_sizes, foreground[:, None])
    )
    by_chance, highest = predicted * true / all_pairs, (predicted + true) / 2
    ari = (together - by_chance) / (highest - by_chance)
    ari = ari.where(highest > by_chance, 1.0).where(visible.sum(1) > 1, torch.nan)
    union = sizes[..., None] + true_sizes[:, None] - both
    best = (both / union.clamp(min=1)).amax(1)
    return ari, best.sum(1) / visible.sum(1)


def _pairs(n):
    return n * (n - 1) / 2


class IslandScores(Metric):
    """Means over images of `mean_cosine`, `count` and `against_mask`, level by level.

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
        names = *COLUMN_SCORES, *MASK_SCORES
        self.add_state("sums", torch.zeros(len(names), levels), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(len(names), levels), dist_reduce_fx="sum")
        self.columns = 0

    def update(self, labels, cosine=None, masks=None):
        """Take in a batch of images.

        Args:
            labels: (B, K, S, S), from `segment`.
            cosine: (B, K), from `mean_cosine`; None where the labels do not come from vectors.
            masks: a dictionary of (B, H, W) with the keys "parts", "objects", or one of them; None
                where the true segments are not known.
        """
        self.columns = labels.shape[-1] ** 2
        scores = dict(zip(("number", "inside"), count(labels), strict=True))
        if cosine is not None:
            scores["cosine"] = cosine
        for name, mask in (masks or {}).items():
            pairs = [against_mask(level, mask) for level in labels.unbind(1)]
            ari, iou = zip(*pairs, strict=True)
            scores |= {f"{name}_ari": torch.stack(ari, 1), f"{name}_iou": torch.stack(iou, 1)}
        for i, name in enumerate((*COLUMN_SCORES, *MASK_SCORES)):
            if name in scores:
                values = scores[name].to(self.sums)
                self.sums[i] += values.nansum(0)
                self.images[i] += values.isfinite().sum(0)

    def update_states(self, states, threshold, masks=None):
        """Take in the states (B, n, K, d) of a batch; neighbours are connected from a cosine of
        `threshold` on. `masks` as for `update`."""
        cosines = neighbour_cosines(states)
        labels = connected(*(c >= threshold for c in cosines))
        self.update(labels, mean_cosine(*cosines), masks)

    def compute(self):
        """The means, as a list with a dictionary for every level.

        Keys: `cosine`, mean cosine of neighbours; `number` of islands; `size`, columns an island;
        `inside`, share of columns in islands of two or more; `parts_ari`, `parts_iou`,
        `objects_ari`, `objects_iou`, against masks. A score that is not known has no key.
        """
        means = (self.sums / self.images).mT.tolist()
        levels = []
        for values in means:
            named = zip((*COLUMN_SCORES, *MASK_SCORES), values, strict=True)
            level = {name: value for name, value in named if not math.isnan(value)}
            if "number" in level:
                level["size"] = self.columns / level["number"]
            levels.append(level)
        return levels

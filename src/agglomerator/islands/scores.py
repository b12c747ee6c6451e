"""Scores of islands: how many, how large, whether they are parts."""

import math

import torch
from torchmetrics import Metric

from agglomerator.islands.segments import agreement, connect, count, neighbour_cosines, to_pixels

OF_COLUMNS = "agreement", "number", "inside"


MASKS = "parts", "objects"


OF_MASKS = tuple(f"{mask}_{score}" for mask in MASKS for score in ("ari", "iou"))


def against_mask(labels, mask):
    """How well a segmentation of images fits the true one.

    Adjusted Rand index (Hubert and Arabie 1985) over the foreground: 1 for the same segments,
    about 0 for ones by chance. Mean best intersection over union: for every true segment that of
    the predicted one which fits it best, over all pixels; the mean over the true segments.

    Args:
        labels: (B, S, S) integers from 0, brought to the mask's size by nearest neighbour.
        mask: (B, H, W) integers, 0 background, 1, 2, ... true segments.

    Returns:
        (ari, iou), each (B,), float64, on the CPU; NaN where fewer than two (ari) or no (iou)
        true segments are visible.
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
    """Means over images of what `count`, `agreement` and `against_mask` say, level by level.

    Args:
        levels: K.
    """

    full_state_update = False

    def __init__(self, levels):
        super().__init__()
        names = *OF_COLUMNS, *OF_MASKS
        self.add_state("sums", torch.zeros(len(names), levels), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(len(names), levels), dist_reduce_fx="sum")
        self.columns = 0

    def update(self, labels, agree=None, masks=None):
        """Take in some images.

        Args:
            labels: (B, K, S, S), from `islands`.
            agree: (B, K), from `agreement`, if there are vectors.
            masks: "parts" and "objects", or one of them, to their (B, H, W), if they are known.
        """
        self.columns = labels.shape[-1] ** 2
        found = dict(zip(("number", "inside"), count(labels), strict=True))
        if agree is not None:
            found["agreement"] = agree
        for name, mask in (masks or {}).items():
            scores = [against_mask(level, mask) for level in labels.unbind(1)]
            ari, iou = zip(*scores, strict=True)
            found |= {f"{name}_ari": torch.stack(ari, 1), f"{name}_iou": torch.stack(iou, 1)}
        for i, name in enumerate((*OF_COLUMNS, *OF_MASKS)):
            if name in found:
                values = found[name].to(self.sums)
                self.sums[i] += values.nansum(0)
                self.images[i] += values.isfinite().sum(0)

    def update_states(self, states, threshold, masks=None):
        """Take in the states (B, n, K, d) of some images, with islands from a threshold on."""
        cosines = neighbour_cosines(states)
        self.update(connect(*(c >= threshold for c in cosines)), agreement(*cosines), masks)

    def compute(self):
        """A list with a dictionary for every level: `agreement` (mean cosine of neighbours),
        `number` of islands, `size` (columns of an island), `inside` (share of columns in
        islands larger than one), and of masks `parts_ari`, `parts_iou`, `objects_ari`,
        `objects_iou`; what is not known is left out."""
        means = (self.sums / self.images).mT.tolist()
        levels = []
        for values in means:
            named = zip((*OF_COLUMNS, *OF_MASKS), values, strict=True)
            level = {name: value for name, value in named if not math.isnan(value)}
            if "number" in level:
                level["size"] = self.columns / level["number"]
            levels.append(level)
        return levels

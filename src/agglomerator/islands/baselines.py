"""Islands against true parts and objects, beside what needs no training to find segments."""

import dataclasses
import warnings
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from skimage.segmentation import felzenszwalb, slic
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from agglomerator.data.masks import NOWHERE
from agglomerator.islands.scores import IslandScores, PositionShare
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

BATCH = 100  # most images at a time; fewer where images or states are large
MOST_NUMBERS, MOST_PIXELS = 2**24, 2**22  # of the states, and of the images, of a batch
MOST_PAIRS = 500_000_000  # pairs of columns, over the images whose vectors are clustered
SIZES = "number", "size", "inside"  # meaningless for segments that are not islands


def compare(model, truth, settings, device, training_masks=None, seed=42):
    """Score the islands of a network, and baselines, against the masks of images.

    The baselines are: the network before training; the output of the tokenizer, without the loop;
    what position alone tells (`PositionPrior`); Felzenszwalb's and SLIC's superpixels; k-means on
    colour and position, which is told the true number of segments; a grid of 4x4. The last row is
    the best that this grid of columns allows: each column gets one value of the true mask, either
    the most common one of its pixels or the most common one of its foreground pixels, whichever
    scores better.

    The vectors of a level are also clustered into the true number of segments, of the first images,
    as many as `MOST_PAIRS` allows.

    Args:
        model: `Agglomerator`.
        truth: `MaskedImages`.
        settings: of the run.
        device: to compute on. The model stays there.
        training_masks: from `masks.of_training`. Without them there is no row of position alone.
        seed: of the untrained network's weights, as at the start of the training.

    Returns:
        A dictionary: `images`, how many were scored; `masks`, how many of them have a segment in
        each mask, and `masks_for_ari`, how many have two or more, which an ARI needs; `clustered`,
        how many of them in clusters; `rows`, dictionaries with `of`, the name of what
        is scored, the scores of `IslandScores`, and for vectors `position`, that of
        `PositionShare`.

    Raises:
        UserError: the states of the network are not finite, or no image can be read.
    """
    s = settings
    pl.seed_everything(seed, workers=True, verbose=False)
    untrained = Agglomerator(**dataclasses.asdict(s)).eval().to(device)
    model = model.eval().to(device)
    of_vectors = {
        "level {}": _Vectors(s, lambda views: model.with_levels(views)[1]),
        "level {}, untrained": _Vectors(s, lambda views: untrained.with_levels(views)[1]),
        "tokenizer alone": _Vectors(s, lambda views: _tokens(model, views), levels=1),
    }
    segments = _Segments(training_masks or {}, s.grid_size)
    n_images, clustered = 0, max(1, MOST_PAIRS // s.n_columns**2)
    for images, masks in truth.batches(_batch_size(s)):
        views = truth.view(images.to(device))
        for vectors in of_vectors.values():
            vectors.update(views, masks, clustered - n_images)
        segments.update(images, masks)
        n_images += len(images)
    if not n_images:
        raise UserError("None of the images that have masks can be read; see the lines above.")
    rows = [row for name, vectors in of_vectors.items() for row in vectors.rows(name)]
    return {
        "images": n_images,
        **segments.counts(truth.masks),
        "clustered": min(n_images, clustered),
        "rows": rows + segments.rows(),
    }


def _batch_size(settings):
    s = settings
    of_states = MOST_NUMBERS // (s.n_columns * s.levels * s.patch_dim)
    return max(1, min(BATCH, of_states, MOST_PIXELS // s.image_size**2))


class _Vectors:
    """The scores of vectors that a network makes of images.

    Args:
        settings: of the run.
        network: function, views (B, C, S, S) -> (B, n, K, d).
        levels: K, where it is not that of the settings.
    """

    def __init__(self, settings, network, levels=None):
        self.network = network
        self.found_by = settings.found_by
        self.scores = IslandScores(levels or settings.levels)
        self.position = PositionShare()

    def update(self, views, masks, told):
        """Take in a batch; vectors of its first `told` images are clustered, too."""
        with torch.no_grad():
            states = self.network(views).cpu()
        if not states.isfinite().all():
            raise UserError(
                "The network's states are not finite on these images, and make no islands; try "
                "--precision=32-true, or another checkpoint."
            )
        told = min(max(told, 0), len(states))
        with threadpool_limits(1):  # many short steps, in which threads would wait for each other
            for rows, clusters in ((slice(told), True), (slice(told, None), False)):
                part = {name: mask[rows] for name, mask in masks.items()}
                if len(states[rows]):
                    self.scores.update_states(
                        states[rows], masks=part, told=clusters, **self.found_by
                    )
            self.position.update(states)

    def rows(self, name):
        """A row for each level, named by its number."""
        both = zip(self.scores.compute(), self.position.compute(), strict=True)
        return [
            {"of": name.format(level)} | scores | {"position": share}
            for level, (scores, share) in enumerate(both)
        ]


def _tokens(model, views):
    tokens = model.image_to_tokens(views.to(model.init_levels.dtype))  # (d, B, n)
    return tokens.permute(1, 2, 0)[:, :, None]  # (B, n, 1, d)


class _Segments:
    """The scores of segments that need no network.

    Args:
        training_masks: as for `compare`.
        side: of the grid of columns.
    """

    def __init__(self, training_masks, side):
        self.priors = {name: PositionPrior(masks) for name, masks in training_masks.items()}
        self.scores, self.n_masks, self.side = defaultdict(lambda: IslandScores(1)), Counter(), side

    def update(self, images, masks):
        """Take in images (B, C, H, W) uint8, and their masks."""
        with threadpool_limits(1):
            for name, mask in masks.items():
                for one in mask:
                    n_segments = int(((found := one.unique()) > 0).sum() - (found == NOWHERE).sum())
                    self.n_masks.update((name, least) for least in (1, 2) if n_segments >= least)
                for row, labels in self._of(images, mask, name):
                    self.scores[row].update(labels[:, None], {name: mask})

    def counts(self, names):
        """How many images have a segment in each mask, and how many two. Says if none has."""
        for name in names:
            if not self.n_masks[name, 1]:
                say(
                    f"{name}: no mask has a segment, a value from 1 to 254 (255 is ignored); save "
                    "the first segment as 1."
                )
        least = {"masks": 1, "masks_for_ari": 2}
        return {key: {name: self.n_masks[name, n] for name in names} for key, n in least.items()}

    def _of(self, images, mask, name):
        """Yield names of rows, and labels (B, H, W) or (B, S, S)."""
        if name in self.priors:
            yield "position alone, true number", self.priors[name](mask)
        yield "Felzenszwalb", graph_segments(images)
        yield "SLIC, 16 segments", superpixels(images)
        yield "k-means, true number", k_means(images, mask)
        yield "grid of 4x4", torch.arange(16).view(4, 4).expand(len(mask), 4, 4)
        for background in (True, False):
            cells = most_common(mask, self.side, background)
            yield background, torch.stack([x.unique(return_inverse=True)[1] for x in cells])

    def rows(self):
        """A row for each."""
        rows = {name: scores.compute()[0] for name, scores in self.scores.items()}
        of_pixels, of_foreground = rows.pop(True), rows.pop(False)
        rows["true masks, on this grid"] = {
            name: max(score, of_foreground[name])
            for name, score in of_pixels.items()
            if name not in SIZES
        }
        return [
            {"of": name} | {key: x for key, x in row.items() if key not in SIZES}
            for name, row in rows.items()
        ]


def graph_segments(images):
    """Segments of Felzenszwalb and Huttenlocher 2004, "Efficient graph-based image segmentation",
    by scikit-image: scale 300, smoothed by 0.5 pixels, of at least 1 % of the pixels.

    Args:
        images: (B, C, H, W) uint8.

    Returns:
        (B, H, W) int64.
    """
    least = max(1, images.shape[2] * images.shape[3] // 100)
    return _each(images, lambda image: felzenszwalb(image, 300, 0.5, least))


def superpixels(images, number=16):
    """SLIC superpixels (Achanta et al. 2012) by scikit-image, about `number` an image, with its
    compactness of 10.

    Args:
        images: (B, C, H, W) uint8.

    Returns:
        (B, H, W) int64.
    """
    return _each(images, lambda image: slic(image, number, start_label=0))


def _each(images, segment):
    """Labels of `segment`, a function of (H, W, 3); gray images come as colours."""
    arrays = images.expand(-1, 3, -1, -1).movedim(1, -1).numpy()
    return torch.from_numpy(np.stack([segment(np.ascontiguousarray(x)) for x in arrays])).long()


class PositionPrior:
    """Segments that do not look at the image: where segments lie in training images.

    A place is background if it lies in a segment at most half as often as the place where that is
    most frequent. The other places are divided by k-means on their positions, weighted by how often
    they lie in a segment, into the true number of segments of the image.

    Args:
        masks: (N, H, W) of training images; 255 counts nowhere.

    Example:
        >>> import numpy as np, torch
        >>> prior = PositionPrior(np.array([[[0, 1, 2, 0]], [[0, 1, 1, 0]]]))
        >>> prior(torch.tensor([[[0, 1, 1, 0]]])).tolist()
        [[[0, 1, 1, 0]]]
    """

    def __init__(self, masks):
        counts = (masks != NOWHERE).sum(0)
        self.share = ((masks > 0) & (masks != NOWHERE)).sum(0) / np.maximum(counts, 1)
        self.inside = self.share > self.share.max() / 2
        self._divided = cache(self._divide)

    def __call__(self, mask):
        """Labels (B, H, W) int64 for true masks (B, H, W), of which the number of segments alone
        is used."""
        numbers = [len(np.setdiff1d(each, (0, NOWHERE))) for each in mask.numpy()]
        return torch.from_numpy(np.stack([self._divided(max(number, 1)) for number in numbers]))

    def _divide(self, number):
        labels = np.zeros(self.inside.shape, np.int64)
        positions, weights = np.argwhere(self.inside), self.share[self.inside]
        if len(positions):
            clusters = KMeans(min(number, len(positions)), n_init=10, random_state=0)
            labels[self.inside] = 1 + clusters.fit_predict(positions, sample_weight=weights)
        return labels


def k_means(images, mask):
    """Segment images by k-means on the colour and position of pixels, both scaled to 0 to 1.

    Args:
        images: (B, C, H, W) uint8.
        mask: (B, H, W) integers. Each image gets as many clusters as its mask has values, 255 not
            counted.

    Returns:
        (B, H, W) int64.

    Example:
        >>> import torch
        >>> image = torch.tensor([[0, 0, 255, 255]] * 2, dtype=torch.uint8)
        >>> labels = k_means(image[None, None], (image > 0)[None].long())
        >>> labels.shape, len(labels.unique())
        (torch.Size([1, 2, 4]), 2)
    """
    height, width = images.shape[2:]
    positions = np.stack(np.mgrid[:height, :width]) / max(height, width)
    labels = []
    for image, true in zip(images.numpy(), mask.numpy(), strict=True):
        features = np.concatenate((image / 255, positions)).reshape(-1, height * width).T
        number = max(1, len(np.setdiff1d(true, NOWHERE)))
        clusters = KMeans(number, n_init=1, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer colours than segments
            labels.append(clusters.fit_predict(features).reshape(height, width))
    return torch.from_numpy(np.stack(labels)).long()


def most_common(mask, side, background=True):
    """The most common value of the pixels of each cell.

    Args:
        mask: (B, H, W) integers, 0 background.
        side: of the grid of cells.
        background: False to leave out the value 0 where a cell has any other.

    Returns:
        (B, side, side) int64.

    Example:
        >>> import torch
        >>> most_common(torch.tensor([[[0, 0, 0, 1], [0, 2, 1, 3]]]), 1)
        tensor([[[0]]])
        >>> most_common(torch.tensor([[[0, 0, 0, 1], [0, 2, 1, 3]]]), 1, background=False)
        tensor([[[1]]])
    """
    found = torch.zeros(len(mask), side, side, dtype=torch.int64)
    greatest = torch.zeros(found.shape)
    values = mask[mask != NOWHERE].unique().tolist()
    for value in (
        values if background else [x for x in values if x]
    ):  # one by one: few lie in memory
        share = F.adaptive_avg_pool2d((mask == value).float(), side)
        found[share > greatest] = value
        greatest = torch.maximum(greatest, share)
    return found

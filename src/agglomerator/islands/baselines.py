"""Islands against the true parts and objects of PartWhole, beside other ways to find segments."""

import dataclasses
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from agglomerator.islands.scores import MASKS, IslandScores
from agglomerator.model.agglomerator import Agglomerator

SCENES = 1000
BATCH = 100


def compare(model, data, settings, device, most=SCENES, seed=42):
    """Score the islands of a network, and baselines, against the masks of test scenes.

    The baselines are: k-means on colour and position, which is told the true number of segments;
    the network before training; the output of the tokenizer, without the loop. The last row is the
    best that this grid allows: each column gets one value of the true mask, either the most common
    one of its pixels or the most common one of its foreground pixels, whichever scores better.

    Args:
        model: `Agglomerator`.
        data: `ImageDataModule` whose test set has masks.
        settings: of the run.
        device: to compute on.
        most: how many scenes to score; the first ones are taken.
        seed: of the untrained network's weights, as at the start of the training.

    Returns:
        A list of rows: dictionaries with `of`, the name of what is scored, and the scores of
        `IslandScores`.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    untrained = Agglomerator(**dataclasses.asdict(settings)).eval().to(device)
    model = model.eval().to(device)
    learned, unlearned = IslandScores(settings.levels), IslandScores(settings.levels)
    tokens, clusters, of_pixels, of_foreground = (IslandScores(1) for _ in range(4))
    threshold = settings.island_threshold
    indices = torch.as_tensor(list(data.test.indices))[:most]
    for batch in indices.split(BATCH):
        images = data.test.dataset[batch][0]
        masks = {name: torch.as_tensor(data.test.dataset.extra[name][batch]) for name in MASKS}
        views = data.view(images.to(device))
        with torch.no_grad():
            for network, scores in ((model, learned), (untrained, unlearned)):
                scores.update_states(network.with_levels(views)[1].cpu(), threshold, masks)
            output = model.image_to_tokens(views).permute(1, 2, 0)[:, :, None]  # (B, n, 1, d)
        tokens.update_states(output.cpu(), threshold, masks)
        for name, mask in masks.items():
            clusters.update(k_means(images, mask)[:, None], masks={name: mask})
            for scores, background in ((of_pixels, True), (of_foreground, False)):
                labels = most_common(mask, settings.grid_size, background)
                scores.update(labels[:, None], masks={name: mask})

    (of_pixels,), (of_foreground,) = of_pixels.compute(), of_foreground.compute()
    best = {name: max(score, of_foreground[name]) for name, score in of_pixels.items()}
    return [
        *_rows("level {}", learned),
        *_rows("level {}, untrained", unlearned),
        *_rows("tokenizer alone", tokens),
        *map(_without_columns, _rows("k-means, true number", clusters)),
        _without_columns({"of": "true masks, on this grid", **best}),
    ]


def _rows(name, scores):
    return [{"of": name.format(level), **row} for level, row in enumerate(scores.compute())]


def _without_columns(row):
    """A row without the scores that say nothing of segments which are no islands."""
    return {name: x for name, x in row.items() if name not in ("number", "size", "inside")}


def k_means(images, mask):
    """Segment images by k-means on the colour and position of pixels, both scaled to 0 to 1.

    Args:
        images: (B, C, H, W) uint8.
        mask: (B, H, W) integers. Each image gets as many clusters as its mask has values.

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
        clusters = KMeans(len(np.unique(true)), n_init=1, random_state=0)
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
    shares = F.adaptive_avg_pool2d(F.one_hot(mask.long()).movedim(-1, 1).float(), side)
    if not background:
        shares[:, 0] = 1e-6
    return shares.argmax(1)

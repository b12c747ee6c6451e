"""Islands against the known parts and objects of PartWhole, beside what else finds segments."""

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

    The baselines: k-means on colour and position of the pixels, for each scene told its number of
    segments; the network before training; the tokenizer's output, without the loop. Beside them
    what the true masks reach when each column is given one value: the one that most of its pixels
    have, or most of those in the foreground, whichever scores better.

    Args:
        model: `Agglomerator`.
        data: `ImageDataModule` whose test set has masks.
        settings: of the run.
        device: to compute on.
        most: the first so many scenes count.
        seed: of the untrained network's weights, as at the start of the training.

    Returns:
        A list of rows, dictionaries of `of`, what is scored, and of what `IslandScores` says.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    untrained = Agglomerator(**dataclasses.asdict(settings)).eval().to(device)
    model = model.eval().to(device)
    learned, unlearned = IslandScores(settings.levels), IslandScores(settings.levels)
    tokens, clusters, cells, fore = (IslandScores(1) for _ in range(4))
    threshold = settings.island_threshold
    rows = torch.as_tensor(list(data.test.indices))[:most]
    for some in rows.split(BATCH):
        images = data.test.dataset[some][0]
        masks = {name: torch.as_tensor(data.test.dataset.extra[name][some]) for name in MASKS}
        views = data.view(images.to(device))
        with torch.no_grad():
            for network, scores in ((model, learned), (untrained, unlearned)):
                scores.update_states(network.with_levels(views)[1].cpu(), threshold, masks)
            output = model.image_to_tokens(views).permute(1, 2, 0)[:, :, None]  # (B, n, 1, d)
        tokens.update_states(output.cpu(), threshold, masks)
        for name, mask in masks.items():
            clusters.update(k_means(images, mask)[:, None], masks={name: mask})
            for scores, background in ((cells, True), (fore, False)):
                labels = most_common(mask, settings.grid_size, background)
                scores.update(labels[:, None], masks={name: mask})

    def named(of, scores):
        return [{"of": of.format(level), **row} for level, row in enumerate(scores.compute())]

    def of_masks_alone(rows):
        of_columns = "number", "size", "inside"
        return [{k: v for k, v in row.items() if k not in of_columns} for row in rows]

    (cells,), (fore,) = cells.compute(), fore.compute()
    on_grid = {name: max(score, fore[name]) for name, score in cells.items()}
    return [
        *named("level {}", learned),
        *named("level {}, untrained", unlearned),
        *named("tokenizer alone", tokens),
        *of_masks_alone(named("k-means, true number", clusters)),
        *of_masks_alone([{"of": "true masks, on this grid", **on_grid}]),
    ]


def k_means(images, mask):
    """Segments of images by k-means on colour and position, all from 0 to 1.

    Args:
        images: (B, C, H, W) uint8.
        mask: (B, H, W) integers; each image has so many clusters as there are values.

    Returns:
        (B, H, W) int64.
    """
    height, width = images.shape[2:]
    places = np.stack(np.mgrid[:height, :width]) / max(height, width)
    found = []
    for image, true in zip(images.numpy(), mask.numpy(), strict=True):
        features = np.concatenate((image / 255, places)).reshape(-1, height * width).T
        clusters = KMeans(len(np.unique(true)), n_init=1, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer colours than segments
            found.append(clusters.fit_predict(features).reshape(height, width))
    return torch.from_numpy(np.stack(found)).long()


def most_common(mask, side, background=True):
    """The value that most pixels of each cell have: (B, H, W) -> (B, side, side).

    Args:
        mask: integers, 0 background.
        side: of the grid of cells.
        background: False for the most common value but 0, where there is any.
    """
    shares = F.adaptive_avg_pool2d(F.one_hot(mask.long()).movedim(-1, 1).float(), side)
    if not background:
        shares[:, 0] = 1e-6
    return shares.argmax(1)

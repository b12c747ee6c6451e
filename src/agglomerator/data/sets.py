"""The data sets. To add one, write a function that reads it and an entry in `DATA_SETS`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

from agglomerator.data.augment import to_channels
from agglomerator.settings import UserError


class ImageSet(Dataset):
    """Images that lie decoded in memory.

    Indexing by a list of numbers returns their batch, (B, C, H, W) uint8 and labels (B,) int64.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers from 0.
        classes: names of the classes, in the order of labels.
    """

    def __init__(self, images, labels, classes):
        self.images = images
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __getitems__(self, indices):
        return self[indices]


@dataclass(frozen=True)
class DataSetEntry:
    """A data set as the program knows it.

    Attributes:
        read: (settings, train) -> ImageSet, the training set or the test set, whole and in order;
            downloads what is missing. Any size and number of channels.
        n_classes: number of classes.
        mean, std: of the channels on the scale 0 to 1, for normalisation.
        erase: Random Erasing after RandAugment in training.
    """

    read: Callable
    n_classes: int
    mean: tuple = (0.5,)
    std: tuple = (0.5,)
    erase: bool = False


def read_digits(settings, train):
    """The 1797 handwritten digits, 8x8, that scikit-learn ships; a fifth of each class is the test
    set, the same for every seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    parts = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    chosen = np.sort(parts[0 if train else 1])
    images = torch.from_numpy((digits.images[chosen] * (255 / 16)).round().astype(np.uint8))
    return ImageSet(images[:, None], digits.target[chosen], map(str, range(10)))


def read_torchvision(name):
    """A reader of one of torchvision's small data sets, from data_dir or else downloaded."""

    def read(settings, train):
        source = getattr(datasets, name)
        try:
            found = source(settings.data_dir, train=train)
        except RuntimeError:
            found = _download(source, name, settings, train)
        images = torch.as_tensor(found.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return ImageSet(images, found.targets, found.classes)

    return read


def _download(source, name, settings, train):
    try:
        return source(settings.data_dir, train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--data_dir={settings.data_dir}: {name} is not there and cannot be downloaded "
            f"({reason}); put its files into {settings.data_dir}/{name}/raw."
        ) from None


DATA_SETS = {
    "digits": DataSetEntry(read_digits, n_classes=10),
    "FashionMNIST": DataSetEntry(read_torchvision("FashionMNIST"), n_classes=10),
}


def entry_of(settings):
    """The entry of --dataset.

    Raises:
        UserError: there is no such data set; the message names the nearest and lists all.
    """
    name = settings.dataset
    if name in DATA_SETS:
        entry = DATA_SETS[name]
    else:
        lower = {known.lower(): known for known in DATA_SETS}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]}? " if near else ""
        raise UserError(f"--dataset={name}: {hint}Known are {', '.join(DATA_SETS)}.")
    if settings.n_classes != entry.n_classes:
        raise UserError(
            f"--n_classes={settings.n_classes}: {name} has {entry.n_classes} classes; "
            f"use --n_classes={entry.n_classes}."
        )
    return entry


def read_split(settings, train):
    """The training set (train) or the test set of --dataset, in the size and channels asked for.

    Raises:
        UserError: the data are missing or do not fit the flags.
    """
    found = entry_of(settings).read(settings, train)
    images = to_channels(found.images, settings.n_channels)
    side = [settings.image_size, settings.image_size]
    if list(images.shape[2:]) != side:
        images = TF.resize(images, side, antialias=True)
    return ImageSet(images, found.labels, found.classes)

"""The data sets. To add one, write a function that reads it, and an entry in `DATA_SETS`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.datasets import FashionMNIST
from torchvision.transforms.v2 import functional as TF

from agglomerator.config import INPUT_SETTINGS
from agglomerator.data.images import ImageSet, batches_of
from agglomerator.data.sets import smallnorb
from agglomerator.data.sets.folder import (
    class_names,
    fingerprint,
    folder_of,
    read_folder,
    splits_of,
)
from agglomerator.data.sets.partwhole import CLASSES, PartWhole
from agglomerator.data.sets.smallnorb import download_smallnorb, read_smallnorb
from agglomerator.data.sets.torchvision_sets import downloader, reader
from agglomerator.data.transforms import to_channels
from agglomerator.hierarchy.classes import known_classes
from agglomerator.util.errors import UserError


@dataclass(frozen=True)
class DataSetEntry:
    """What the program needs to know of a data set.

    Attributes:
        read: function (settings, train) -> `ImageSet` of the whole training set, or test set, in
            order, with images of any size and number of channels. None for folders of images.
        classes: names, in the order of labels. None for folders of images, which bring their own.
        download: function (settings) that downloads what is missing. None if nothing can be.
        mean, std: of the channels on the scale 0 to 1, for normalisation.
        margin: images are kept this many times larger than image_size, and cropped: at random in
            training, in the middle otherwise.
        erase: whether training applies Random Erasing after any augmentation.
        masks: function (settings, n) -> masks of n training images, for `data/masks.py`. None if
            there are none, or the data set is a folder of images.
        of_any_size: batch and length of a training follow from the number of its images, where the
            user does not give them (`training/length.py`).
    """

    read: Callable | None = None
    classes: tuple | None = None
    download: Callable | None = None
    mean: tuple = (0.5,)
    std: tuple = (0.5,)
    margin: float = 1.0
    erase: bool = False
    masks: Callable | None = None
    of_any_size: bool = False

    @property
    def n_classes(self):
        return None if self.classes is None else len(self.classes)


DIGITS = tuple("0123456789")


def read_digits(settings, train):
    """The 1797 handwritten digits, 8x8, that scikit-learn brings. A fifth of each class is the test
    set, whatever the seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    parts = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    chosen = np.sort(parts[0 if train else 1])
    images = torch.from_numpy((digits.images[chosen] * (255 / 16)).round().astype(np.uint8))
    return ImageSet(images[:, None], digits.target[chosen], DIGITS)


class _Scenes(PartWhole):
    """PartWhole scenes in batches: images, labels, parts, objects."""

    def __getitems__(self, indices):
        scenes = [self[i] for i in indices]
        fields = "image", "label", "parts", "objects"
        return [np.stack([getattr(scene, field) for scene in scenes]) for field in fields]


def read_partwhole(settings, train):
    """PartWhole scenes of the settings' size, difficulty and number of objects, always the same
    scenes. `extra` has the masks `parts` and `objects`, (N, S, S) uint8."""
    s = settings
    try:
        scenes = _Scenes(
            "train" if train else "test",
            image_size=s.image_size,
            difficulty=s.difficulty,
            objects=s.objects,
        )
    except ValueError as error:
        raise UserError(f"--dataset=PartWhole: {error}.") from None
    batches = zip(*batches_of(scenes, 250, s.num_workers), strict=True)
    images, labels, parts, objects = (np.concatenate(arrays) for arrays in batches)
    return ImageSet(images, labels, CLASSES, {"parts": parts, "objects": objects})


def partwhole_masks(settings, n):
    """Masks `parts` and `objects`, (n, S, S) uint8, of the first n training scenes."""
    s = settings
    scenes = PartWhole(
        "train", n, image_size=s.image_size, difficulty=s.difficulty, objects=s.objects
    )
    return dict(zip(("parts", "objects"), scenes.arrays()[2:], strict=True))


def of_torchvision(name, classes, **options):
    """The entry of a small data set of torchvision."""
    return DataSetEntry(reader(name), tuple(classes), downloader(name), **options)


IMAGENET_COLOURS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DATA_SETS = {
    "CIFAR10": of_torchvision(
        "CIFAR10",
        known_classes("CIFAR10"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "CIFAR100": of_torchvision(
        "CIFAR100",
        known_classes("CIFAR100"),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        erase=True,
    ),
    "MNIST": of_torchvision("MNIST", DIGITS),
    "FashionMNIST": of_torchvision("FashionMNIST", FashionMNIST.classes),
    "smallNORB": DataSetEntry(read_smallnorb, smallnorb.CLASSES, download_smallnorb, margin=1.5),
    "IMAGENET": DataSetEntry(margin=1.125, **IMAGENET_COLOURS),
    "ImageFolder": DataSetEntry(of_any_size=True, **IMAGENET_COLOURS),
    "PartWhole": DataSetEntry(read_partwhole, CLASSES, masks=partwhole_masks),
    "digits": DataSetEntry(read_digits, DIGITS),
}


def entry_of(settings):
    """The entry of --dataset.

    Raises:
        UserError: there is no such data set; the message names the most similar one and lists all.
    """
    return _known(settings.dataset, "--dataset")


def normalization_of(settings):
    """Mean and standard deviation for normalisation, a tuple each with a number for each channel.

    Raises:
        UserError: there is no such data set.
    """
    entry = entry_of(settings)
    if settings.normalization is not None:
        entry = _known(settings.normalization, "--normalization")
    if settings.n_channels == 1:
        return tuple((sum(x) / len(x),) for x in (entry.mean, entry.std))
    return entry.mean, entry.std


def _known(name, flag):
    if name in DATA_SETS:
        return DATA_SETS[name]
    lower = {known.lower(): known for known in DATA_SETS}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {lower[near[0]]}? " if near else ""
    raise UserError(f"{flag}={name}: {hint}Known are {', '.join(DATA_SETS)}.")


def classes_of(settings):
    """Names of the classes of --dataset, in the order of labels, as a tuple.

    Raises:
        UserError: there is no such data set, or no such folder.
    """
    return entry_of(settings).classes or tuple(class_names(settings))


def training_images(settings):
    """An identifier of the training images of --dataset: the name of the data set, or a hash of the
    file names of a folder.

    Raises:
        UserError: there is no such data set, or no such folder.
    """
    return fingerprint(settings) if entry_of(settings).read is None else settings.dataset


def check_test(settings):
    """Raises UserError if --dataset is a folder without test images."""
    if entry_of(settings).read is None:
        splits_of(folder_of(settings))


_READ = {}  # what this run has read: its stages share it


def read_split(settings, split):
    """The "train", "val" or "test" images of --dataset: squares of side image_size times the
    entry's margin, with n_channels channels.

    Returns:
        An `ImageSet`, or `ImageFiles` if the images do not fit into memory. None for "val" if the
        data set has no validation images of its own.

    Raises:
        UserError: the data are missing or damaged, or do not fit the flags.
    """
    names = (*INPUT_SETTINGS, "data_dir", "skip_unreadable")
    key = split, *(getattr(settings, name) for name in names)
    if key not in _READ:
        _READ[key] = _read(settings, split)
    return _READ[key]


def _read(settings, split):
    entry, side = entry_of(settings), side_of(settings)
    if entry.read is None:
        return read_folder(settings, split, side)
    if split == "val":
        return None
    dataset = entry.read(settings, split == "train")
    where = f"--dataset={settings.dataset} ({settings.data_dir})"
    if len(dataset.images) != len(dataset.labels):
        raise UserError(f"{where}: {len(dataset.images)} images, but {len(dataset.labels)} labels.")
    n_classes = len(dataset.classes)
    wrong = ((dataset.labels < 0) | (dataset.labels >= n_classes)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise UserError(
            f"{where}: image {i} of the {split} set has label {int(dataset.labels[i])}, but there "
            f"are {n_classes} classes, 0 to {n_classes - 1}."
        )
    pixels = to_channels(dataset.images, settings.n_channels)
    if pixels.shape[2:] != (side, side):
        parts = pixels.split(4096)
        pixels = torch.cat([TF.resize(part, [side, side], antialias=True) for part in parts])
    return ImageSet(pixels, dataset.labels, dataset.classes, dataset.extra, dataset.groups)


def side_of(settings):
    """Side of the images before cropping."""
    return round(settings.image_size * entry_of(settings).margin)

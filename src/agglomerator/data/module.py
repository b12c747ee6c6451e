"""The data of a run: the split, batches in an order that seed and epoch fix, and their views."""

import math
from functools import cached_property

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Subset

from agglomerator.data import registry
from agglomerator.data.augment import (
    rand_augment,
    random_crop,
    random_erasing,
    random_horizontal_flip,
)
from agglomerator.data.crops import labelled_views, random_affine, random_views
from agglomerator.data.download import one_at_a_time
from agglomerator.data.images import ImageFiles, OnDevice, as_it_is, n_workers, numbered
from agglomerator.data.limits import chosen, n_batches
from agglomerator.data.loaders import TrainLoader, TrainOrder, leave_signals
from agglomerator.data.transforms import center_crop, denormalize, normalize, send
from agglomerator.hierarchy.classes import hierarchy_of
from agglomerator.util.errors import UserError


class ImageDataModule(LightningDataModule):
    """The data set of a run, in batches.

    A batch is uint8 images (B, C, H, W) and labels (B,); in a test, in place of labels, the indices
    of the images in the data set, which `test_labels` takes. `view` and `augmented_view` turn
    images into the network's input, on the device where they are; `crop` makes them fit to look at.
    The LightningModule calls these itself: `on_after_batch_transfer` does not know the index of the
    batch, on which random draws depend, and validation in stage one needs both kinds of view.

    Args:
        settings: of the run.
        class_map: `ClassMap` with the labels of the run; None for the labels of the data set.
        split_seed: decides which training images are held out; None for the seed of the run.

    Attributes:
        classes: names, in the order of labels.
        train, val, test: subsets in data-set order. `train` and `val` are read at first use.
            --limit_test applies to `test`, which `setup` reads. It is empty if a folder has none,
            which masked pre-training allows.
        hierarchy: `Hierarchy` of the classes, or None; set by `setup`.

    Raises:
        UserError: there is no such data set, --limit_test is less than one batch, or --hierarchy
            does not fit the classes.
    """

    def __init__(self, settings, class_map=None, split_seed=None):
        super().__init__()
        self.settings, self.class_map = settings, class_map
        self.split_seed = settings.seed if split_seed is None else split_seed
        self.entry = registry.entry_of(settings)
        self.mean, self.std = registry.normalization_of(settings)
        names = registry.classes_of(settings) if class_map is None else class_map.names
        self.classes = list(names)

    def prepare_data(self):
        """Download what is missing. Other processes of this machine that want the same wait."""
        if self.entry.download is not None and not hasattr(self, "test"):
            with one_at_a_time(self.settings.data_dir):
                self.entry.download(self.settings)

    def setup(self, stage=None):
        """Read the test set, which every run needs."""
        if hasattr(self, "test"):
            return
        test = self._read("test")
        self.hierarchy = hierarchy_of(self.settings, self.classes)
        self._whole_test = Subset(self.train.dataset, []) if test is None else _all_of(test)
        self.test = self._chosen(self._whole_test, "test")

    def _read(self, split):
        images = registry.read_split(self.settings, split)
        return images if self.class_map is None or images is None else self.class_map.apply(images)

    @cached_property
    def _divided(self):
        whole, val = self._read("train"), self._read("val")
        if val is not None:
            return _all_of(whole), _all_of(val)
        return split(whole, self.settings.val_share, self.split_seed)

    def limited(self, name):
        """The images of "train", "val" or "test" that --limit_train, --limit_val or --limit_test
        leaves: drawn by seed, in data-set order.

        Raises:
            UserError: the limit is less than one batch.
        """
        return self.test if name == "test" else self._chosen(getattr(self, name), name)

    def whole(self, name):
        """All images of "train", "val" or "test", without a limit."""
        return self._whole_test if name == "test" else getattr(self, name)

    def origin(self):
        """What a checkpoint stores of its data: the class names, and what decides the split beside
        --val_share."""
        return {
            "class_names": self.classes,
            "split_seed": self.split_seed,
            "training_images": registry.training_images(self.settings),
        }

    def check_test(self):
        """Raises UserError if there is no test image."""
        if not len(self.test):
            raise UserError(
                f"--data_dir={self.settings.data_dir}: has no test/ folder; put images there, or, "
                "for --mode=islands and explore, name some by --images."
            )

    def _chosen(self, subset, name):
        drawn = chosen(self.settings, name, len(subset))
        if len(drawn) == len(subset):
            return subset
        return Subset(subset.dataset, torch.as_tensor(subset.indices)[drawn].tolist())

    @property
    def train(self):
        return self._divided[0]

    @property
    def val(self):
        return self._divided[1]

    def check_batch_size(self, world_size):
        """Check that the images suffice for `world_size` processes.

        Raises:
            UserError: a process would have less than one training batch, no image to validate, or
                batches of another size than the other processes.
        """
        share = len(self.train) // world_size
        if world_size > 1 and self.settings.skip_unreadable and _reads_files(self.train):
            raise UserError(
                "--skip_unreadable: several processes need batches of one size, but these images "
                "are read during training; remove the unreadable ones, or train in one process."
            )
        for name in ("train", "val"):
            self.images_an_epoch(name, world_size)
        if len(self.val) < world_size and self.settings.limit_val:
            raise UserError(
                f"--dataset={self.settings.dataset}: {len(self.val)} images to validate, too few "
                f"for {world_size} processes; use fewer processes, or --limit_val=0."
            )
        if share < self.settings.batch_size:
            raise UserError(
                f"--batch_size={self.settings.batch_size}: more than the {share} training images"
                f"{' of one process' if world_size > 1 else ''}; use at most {share}."
            )

    def images_an_epoch(self, name, world_size):
        """How many images of "train" or "val" all processes together see in an epoch.

        Raises:
            UserError: --limit_train or --limit_val leaves a process less than one batch.
        """
        n_images, batch = len(getattr(self, name)), self.settings.batch_size
        full = n_images // world_size // batch
        batches = full if name == "train" else math.ceil(n_images / world_size / batch)
        return min(n_images, n_batches(self.settings, name, batches) * batch * world_size)

    def train_dataloader(self):
        """Full batches, shuffled by seed and epoch."""
        order = TrainOrder(self.train, self.trainer, self.settings)
        return self._loader(self.train, TrainLoader, sampler=order, drop_last=True)

    def val_dataloader(self):
        return self.in_order(self._mixed(self.val))

    def test_dataloader(self):
        in_order = self.settings.classifies
        tested = Subset(numbered(self.test.dataset), self.test.indices)
        return self.in_order(tested if in_order else self._mixed(tested))

    def test_labels(self, rows):
        """Labels (B,) of test images by their indices (B,), on the same device."""
        return send(self.test.dataset.labels[rows.cpu()], rows.device)

    def _mixed(self, subset):
        """A subset in an order that the seed fixes. Folders list class by class, and the
        contrastive loss of a batch of one class says nothing."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(subset), generator=generator)
        return Subset(subset, order.tolist())

    def in_order(self, subset):
        """Batches of a subset in its order. Each image goes to one process."""
        mine = range(self.trainer.global_rank, len(subset), self.trainer.world_size)
        return self._loader(Subset(subset, mine))

    def _loader(self, subset, kind=DataLoader, **options):
        if _reads_files(subset):
            workers = n_workers(self.settings.num_workers)
            options |= {"num_workers": workers, "persistent_workers": workers > 0}
            options |= {"worker_init_fn": leave_signals if workers else None}
            options["pin_memory"] = torch.cuda.is_available()
        elif OnDevice.fits(subset, device := self.trainer.strategy.root_device):
            subset = OnDevice(subset, device)
        return kind(subset, self.settings.batch_size, collate_fn=as_it_is, **options)

    def crop(self, images):
        """The middle of images as they are stored, of side image_size."""
        if self.entry.margin == 1:
            return images
        return center_crop(images, self.settings.image_size)

    def view(self, images):
        """uint8 images -> their middle, normalised, float32."""
        return normalize(self.crop(images), self.mean, self.std)

    def colours(self, views):
        """Normalised images -> colours from 0 to 1."""
        return denormalize(views, self.mean, self.std)

    def augmented_view(self, images, generator):
        """uint8 images -> augmented, normalised, float32. Every image has its own draws."""
        if self.entry.margin > 1:
            images = random_crop(images, self.settings.image_size, generator)
        if self.settings.augmentation == "randaugment":
            images = rand_augment(images, generator)
        elif self.settings.augmentation == "views":
            images = random_views(images, generator)
        elif self.settings.augmentation == "affine":
            images = random_affine(images, generator)
        elif self.settings.augmentation in ("crop", "flip"):
            size = self.settings.image_size
            images = random_crop(images, size, generator, padding=size // 8)
        if self.settings.augmentation in ("flip", "mirror"):
            images = random_horizontal_flip(images, generator)
        if self.entry.erase:
            images = random_erasing(images, generator)
        return self.view(images)

    def labelled_view(self, images, labels, generator):
        """A view as with --augmentation=views of uint8 images, and its labels, from labels
        (B, L, S, S) of the places of the images that `view` shows."""
        images, labels = labelled_views(self.crop(images), labels, generator)
        return self.view(images), labels


def split(whole, share, seed):
    """Divide a data set into training and validation images.

    If the data set has groups, whole groups are held out: of each class the same share, as far as
    possible, and at least one group if the share is more than 0. If not, a class of which all
    images are drawn keeps its first one to learn from. Files that cannot be read change nothing for
    the others.

    Args:
        whole: `ImageSet` or `ImageFiles` of N images.
        share: of the images, or groups, to hold out for validation.
        seed: of the division, which depends on N or the groups besides.

    Returns:
        (train, val): two subsets in data-set order.
    """
    generator = torch.Generator().manual_seed(seed)
    if whole.groups is None:
        listed = torch.ones(len(whole), dtype=torch.bool) if whole.listed is None else whole.listed
        order = torch.randperm(len(listed), generator=generator)
        in_val = torch.zeros(len(listed), dtype=torch.bool)
        in_val[order[: round(share * len(listed))]] = True
        in_val = in_val[listed]
        for label in set(whole.labels.tolist()) - set(whole.labels[~in_val].tolist()):
            in_val[(whole.labels == label).nonzero()[0]] = False
    else:
        groups, first = np.unique(whole.groups, return_index=True)
        order = torch.randperm(len(groups), generator=generator).numpy()
        classes = whole.labels.numpy()[first[order]]
        rank = np.empty(len(groups))  # within the class, from 0 to 1
        for label in set(classes):
            members = classes == label
            rank[members] = np.arange(members.sum()) / members.sum()
        held_out = max(round(share * len(groups)), share > 0)
        chosen = order[np.argsort(rank, kind="stable")[:held_out]]
        in_val = torch.from_numpy(np.isin(whole.groups, groups[chosen]))
    rows = torch.arange(len(in_val))
    return Subset(whole, rows[~in_val].tolist()), Subset(whole, rows[in_val].tolist())


def _all_of(images):
    return Subset(images, range(len(images)))


def _reads_files(subset):
    """Whether images are read from their files at each use."""
    if isinstance(subset, Subset):
        return _reads_files(subset.dataset)
    return isinstance(subset, ImageFiles)

"""What feeds a run: the split, batches in an order fixed by seed and epoch, and their views."""

import contextlib
import hashlib
import math
import os
import signal
import tempfile
import threading
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler, Subset

from agglomerator.config import UserError
from agglomerator.data import registry
from agglomerator.data.augment import (
    rand_augment,
    random_crop,
    random_erasing,
    random_horizontal_flip,
)
from agglomerator.data.images import ImageFiles, as_it_is, n_workers
from agglomerator.data.transforms import center_crop, denormalize, normalize
from agglomerator.hierarchy.classes import hierarchy_of
from agglomerator.util.random import seeded_generator


class ImageDataModule(LightningDataModule):
    """The data set of a run.

    Batches are uint8 images (B, C, H, W) and labels (B,); `view` and `augmented_view` make the
    network's input of them, on whatever device they are, `crop` what a person should see.

    Attributes: `classes`, names; after `setup` `train`, `val`, `test`, subsets in data-set order,
    the first two read when they are first asked for, the last as --limit_test leaves it; and
    `hierarchy`, what is known of the classes' super-classes, or None.

    Args:
        settings: of the run.
        class_map: `ClassMap` with the labels of the run; None for those of the data set.
        split_seed: decides which training images are held out; None for the run's seed.

    Raises:
        UserError: there is no such data set, --limit_test is less than a batch, or --hierarchy does
            not fit the classes.
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
        """Download what is missing; processes of this machine that want the same wait."""
        if self.entry.download is not None and not hasattr(self, "test"):
            with one_at_a_time(self.settings.data_dir):
                self.entry.download(self.settings)

    def setup(self, stage=None):
        """Read the test set, which there is no run without."""
        if hasattr(self, "test"):
            return
        test = self._read("test")
        self.hierarchy = hierarchy_of(self.settings, self.classes)
        self._whole_test = _all_of(test)
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
        """What --limit_train, --limit_val or --limit_test leaves of "train", "val" or "test": so
        many batches of images, drawn by seed, in data-set order.

        Raises:
            UserError: it is less than one batch.
        """
        return self.test if name == "test" else self._chosen(getattr(self, name), name)

    def whole(self, name):
        """All of "train", "val" or "test", whatever --limit_... leaves."""
        return self._whole_test if name == "test" else getattr(self, name)

    def origin(self):
        """What a checkpoint tells of its data, by name: its classes, and what its split depends on
        beside --val_share."""
        return {
            "class_names": self.classes,
            "split_seed": self.split_seed,
            "training_images": registry.training_images(self.settings),
        }

    def _chosen(self, subset, name):
        s, n_images = self.settings, len(subset)
        n = n_batches(s, name, math.ceil(n_images / s.batch_size)) * s.batch_size
        if n >= n_images:
            return subset
        drawn = (
            torch.randperm(n_images, generator=seeded_generator(s.seed, n_images))[:n].sort().values
        )
        return Subset(subset.dataset, torch.as_tensor(subset.indices)[drawn].tolist())

    @property
    def train(self):
        return self._divided[0]

    @property
    def val(self):
        return self._divided[1]

    def check_batch_size(self, world_size):
        """Raises UserError if a process has fewer training images than a batch, no image to
        validate, or batches of another size than those of the other processes."""
        share = len(self.train) // world_size
        if world_size > 1 and self.settings.skip_unreadable and _reads_files(self.train):
            raise UserError(
                "--skip_unreadable: several processes need batches of one size, and these images "
                "are read on the way; remove those that cannot be read, or train in one process."
            )
        for name in ("train", "val"):
            self.images_an_epoch(name, world_size)
        if len(self.val) < world_size and self.settings.limit_val:
            raise UserError(
                f"--dataset={self.settings.dataset}: {len(self.val)} images to validate, too few "
                f"for {world_size} processes; use fewer, or --limit_val=0."
            )
        if share < self.settings.batch_size:
            raise UserError(
                f"--batch_size={self.settings.batch_size}: more than the {share} training images"
                f"{' of one process' if world_size > 1 else ''}; use at most {share}."
            )

    def images_an_epoch(self, name, world_size):
        """How many images of "train" or "val" so many processes together see in an epoch.

        Raises:
            UserError: --limit_train or --limit_val is less than one batch in each of them.
        """
        n_images, batch = len(getattr(self, name)), self.settings.batch_size
        full = n_images // world_size // batch
        batches = full if name == "train" else math.ceil(n_images / world_size / batch)
        return min(n_images, n_batches(self.settings, name, batches) * batch * world_size)

    def train_dataloader(self):
        """Shuffled by seed and epoch; batches that are not full are left out."""
        order = _Order(self.train, self.trainer, self.settings)
        return self._loader(self.train, TrainLoader, sampler=order, drop_last=True)

    def val_dataloader(self):
        return self.in_order(self._mixed(self.val))

    def test_dataloader(self):
        s = self.settings
        classifies = s.supervise or s.finetune
        return self.in_order(self.test if classifies else self._mixed(self.test))

    def _mixed(self, subset):
        """In an order fixed by the seed: folders list class by class, and the contrastive loss of a
        batch of one class says nothing."""
        drawn = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(subset), generator=drawn)
        return Subset(subset, order.tolist())

    def in_order(self, subset):
        """Batches of a subset in its order, each image in one process."""
        mine = range(self.trainer.global_rank, len(subset), self.trainer.world_size)
        return self._loader(Subset(subset, mine))

    def _loader(self, subset, kind=DataLoader, **options):
        if _reads_files(subset):
            workers = n_workers(self.settings.num_workers)
            options |= {"num_workers": workers, "persistent_workers": workers > 0}
            options |= {"worker_init_fn": _leave_signals if workers else None}
            options["pin_memory"] = torch.cuda.is_available()
        return kind(subset, self.settings.batch_size, collate_fn=as_it_is, **options)

    def crop(self, images):
        """Images as they are stored -> their middle, of side image_size."""
        if self.entry.margin == 1:
            return images
        return center_crop(images, self.settings.image_size)

    def view(self, images):
        """uint8 images -> their middle, normalised float32 images, nothing else changed."""
        return normalize(self.crop(images), self.mean, self.std)

    def colours(self, views):
        """Normalised images -> their colours on the scale 0 to 1."""
        return denormalize(views, self.mean, self.std)

    def augmented_view(self, images, generator):
        """uint8 images -> normalised float32 images, each changed in its own way."""
        if self.entry.margin > 1:
            images = random_crop(images, self.settings.image_size, generator)
        if self.settings.augmentation == "randaugment":
            images = rand_augment(images, generator)
        elif self.settings.augmentation in ("crop", "flip"):
            size = self.settings.image_size
            images = random_crop(images, size, generator, padding=size // 8)
        if self.settings.augmentation in ("flip", "mirror"):
            images = random_horizontal_flip(images, generator)
        if self.entry.erase:
            images = random_erasing(images, generator)
        return self.view(images)


class _Order(DistributedSampler):
    """The training images of a process in the order of the epoch, from where the trainer stands
    in it: a resumed run does not read what it has seen."""

    def __init__(self, subset, trainer, settings):
        super().__init__(
            subset, trainer.world_size, trainer.global_rank, seed=settings.seed, drop_last=True
        )
        self.trainer, self.batch_size = trainer, settings.batch_size

    def __iter__(self):
        self.set_epoch(self.trainer.current_epoch)
        batches_done = self.trainer.fit_loop.batch_idx + 1
        yield from islice(super().__iter__(), batches_done * self.batch_size, None)


class TrainLoader(DataLoader):
    """Begins to read when the first batch is wanted. Its processes would begin before the trainer
    knows in which epoch it is."""

    def __iter__(self):
        yield from super().__iter__()


def _leave_signals(worker):
    """Let signals that end a run be the main process's alone to answer, also those that a cluster
    or a terminal sends to all processes of a run: it still needs batches."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def is_lost_worker(error):
    """Whether a RuntimeError of PyTorch tells that a process which reads images has ended."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


@contextlib.contextmanager
def one_at_a_time(folder):
    """Wait until no other process of this machine is in the same place for the same folder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"agglomerator-{name}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of another user: as without
            fcntl.lockf(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield


def split(whole, share, seed):
    """Divide a data set into training and validation images: two subsets in data-set order.

    Where it has groups, whole ones are held out, the same share of every class as far as that goes,
    and at least one if the share is more than 0.

    Args:
        whole: N images.
        share: of them, or of their groups, held out for validation.
        seed: that the division depends on, beside N or the groups.
    """
    draw = torch.Generator().manual_seed(seed)
    if whole.groups is None:
        order = torch.randperm(len(whole), generator=draw)
        in_val = torch.zeros(len(whole), dtype=torch.bool)
        in_val[order[: round(share * len(whole))]] = True
    else:
        groups, first = np.unique(whole.groups, return_index=True)
        order = torch.randperm(len(groups), generator=draw).numpy()
        of_class = whole.labels.numpy()[first[order]]
        place = np.empty(len(groups))  # within the class, from 0 to 1
        for label in set(of_class):
            mine = of_class == label
            place[mine] = np.arange(mine.sum()) / mine.sum()
        held_out = max(round(share * len(groups)), share > 0)
        chosen = order[np.argsort(place, kind="stable")[:held_out]]
        in_val = torch.from_numpy(np.isin(whole.groups, groups[chosen]))
    rows = torch.arange(len(in_val))
    return Subset(whole, rows[~in_val].tolist()), Subset(whole, rows[in_val].tolist())


def n_batches(settings, name, batches):
    """How many of so many batches --limit_<name> leaves: its number, or its share of them.

    Raises:
        UserError: a share that is less than one batch.
    """
    limit = getattr(settings, f"limit_{name}")
    if isinstance(limit, int):
        return min(limit, batches)
    if limit > 0 and batches and int(limit * batches) == 0:
        raise UserError(
            f"--limit_{name}={limit}: less than one of {batches} batches; use a number of "
            f"batches, as --limit_{name}=1."
        )
    return int(limit * batches)


def _all_of(images):
    return Subset(images, range(len(images)))


def _reads_files(subset):
    """Whether images are read from their files when they are needed."""
    if isinstance(subset, Subset):
        return _reads_files(subset.dataset)
    return isinstance(subset, ImageFiles)

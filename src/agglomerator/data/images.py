"""Images of a data set: decoded in memory, or read from their files at each use.

torchvision's ImageFolder reads an image at a time, cannot leave out damaged files, and keeps its
list of paths once in every worker process. That is why this is our own.
"""

import copy
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from agglomerator.data.decode import UnreadableImage, read_image, read_photograph
from agglomerator.data.transforms import center_crop, send
from agglomerator.util.terminal import say

SHARE = 0.25  # of a GPU's memory, that the images of a data set may take


class ImageSet(Dataset):
    """Images that are decoded in memory.

    A list of indices gives a batch: images (B, C, H, W) uint8 and labels (B,) int64.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers from 0.
        classes: names, in the order of labels.
        extra: a dictionary of further arrays with one row an image, like the masks `parts` and
            `objects` of PartWhole (N, H, W), or the `info` of smallNORB (N, 4).
        groups: (N,) integers, equal for images of one thing, which are not divided between training
            and validation. None if each image stands alone.
        paths: (N,) of the files, as bytes. None if there are no files of single images.
        listed: where files could not be read, which of all files the images are, (all files,) bool;
            else None.

    Example:
        >>> import torch
        >>> dataset = ImageSet(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), [0, 1, 0, 1, 1], "ab")
        >>> images, labels = dataset[[0, 3]]
        >>> images.shape, labels
        (torch.Size([2, 1, 8, 8]), tensor([0, 1]))
    """

    def __init__(self, images, labels, classes, extra=None, groups=None, paths=None, listed=None):
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)
        self.extra = extra or {}
        self.groups, self.paths, self.listed = groups, paths, listed
        self.copies = {}  # by device, the images and their copy there, of `OnDevice`

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __getitems__(self, indices):
        return self[indices]


class OnDevice(Dataset):
    """Images of an `ImageSet`, or of nested subsets of one, that lie on a device, from which lists
    of indices gather batches there. The sets of one `ImageSet` share a copy of its bytes.

    Args:
        subset: an `ImageSet`, or `Subset` of one.
        device: to hold them.
    """

    def __init__(self, subset, device):
        rows = torch.arange(len(subset))
        while isinstance(subset, Subset):
            rows = torch.as_tensor(subset.indices)[rows]
            subset = subset.dataset
        self.rows, self.device = rows, device
        source, copied = subset.copies.get(device, (None, None))
        if source is not subset.images:
            copied = send(subset.images, device)
            subset.copies[device] = subset.images, copied
        self.images, self.labels = copied, send(subset.labels, device)  # a class map changes labels

    @staticmethod
    def fits(subset, device):
        """Whether the images of `subset`, in memory, take at most SHARE of a GPU's."""
        while isinstance(subset, Subset):
            subset = subset.dataset
        if not isinstance(subset, ImageSet) or device.type != "cuda":
            return False
        return subset.images.nbytes <= SHARE * torch.cuda.get_device_properties(device).total_memory

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        rows = send(self.rows[indices], self.device)
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)


class ImageFiles(Dataset):
    """Images that are read from their files at each use, indexed like an `ImageSet`.

    Args:
        paths: of the N files.
        labels: (N,) integers from 0.
        classes: names, in the order of labels.
        size: side S of the images returned.
        n_channels: C, 1 or 3.
        skip_unreadable: leave out files that cannot be read, and say so. Otherwise they raise.
    """

    groups = listed = None

    def __init__(self, paths, labels, classes, size, n_channels, skip_unreadable=False):
        # One array: every worker process would come to copy a list of a million strings.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)
        self.size, self.n_channels, self.skip_unreadable = size, n_channels, skip_unreadable

    def __len__(self):
        return len(self.paths)

    @property
    def n_bytes(self):
        """Memory for all images, decoded."""
        return len(self) * self.n_channels * self.size**2

    def __getitem__(self, index):
        """An image (C, S, S) and its label for an index, a batch of them for several indices."""
        if np.ndim(index) == 0:
            return self._read(index), self.labels[index]
        images, read = self.fetch(index)
        return images, self.labels[read]

    def __getitems__(self, indices):
        return self[indices]

    def fetch(self, index):
        """Read images.

        Args:
            index: a sequence of indices.

        Returns:
            Those that can be read, (B, C, S, S), and their indices, a list.

        Raises:
            UnreadableImage: an image cannot be read, and skip_unreadable is not set.
        """
        images, read = [], []
        for i in index:
            try:
                images.append(self._read(i))
                read.append(int(i))
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                say(f"skipped: {error}", every_process=True)
        none = torch.empty(0, self.n_channels, self.size, self.size, dtype=torch.uint8)
        return torch.stack(images) if images else none, read

    def _read(self, i):
        return read_image(os.fsdecode(self.paths[i]), self.size, self.n_channels)

    def in_memory(self, num_workers):
        """All images as an `ImageSet`, decoded by at most `num_workers` processes.

        Raises:
            UnreadableImage: an image cannot be read, and skip_unreadable is not set.
        """
        total, done = len(self), 0
        images = torch.empty(total, self.n_channels, self.size, self.size, dtype=torch.uint8)
        read = torch.empty_like(self.labels)
        batch = max(1, min(256, 2**22 // (self.n_channels * self.size**2)))
        for pixels, indices in batches_of(numbered(self), batch, num_workers):
            rows = slice(done, done + len(pixels))
            images[rows], read[rows] = pixels, indices
            done += len(pixels)
        if done < total:
            say(f"{total - done} of {total} images cannot be read and are left out.")
        read, listed = read[:done], None
        if done < total:
            listed = torch.zeros(total, dtype=torch.bool)
            listed[read] = True
        images, paths = images[:done], self.paths[read.numpy()]
        return ImageSet(images, self.labels[read], self.classes, paths=paths, listed=listed)


def photographs(paths, settings, margin=1.0, most=256):
    """Image files as people have them, to show what a network sees in them.

    Args:
        paths: of the files; or Pillow images.
        settings: of the network.
        margin: of the data set's entry; the middle is cut out, as for the network.
        most: greatest side of what is returned, in pixels.

    Returns:
        A list of (n_channels, H, H) uint8: the middle square at its own resolution, or at
        image_size if that is finer.

    Raises:
        UnreadableImage: a file cannot be read as an image.
    """
    sides = round(settings.image_size * margin), round(most * margin)
    found = (read_photograph(path, *sides, settings.n_channels) for path in paths)
    return [center_crop(image, round(image.shape[-1] / margin)) for image in found]


def numbered(images):
    """A copy of a data set whose labels are the indices of its images. They tell which images came
    if some could not be read."""
    copied = copy.copy(images)
    copied.labels = torch.arange(len(images))
    return copied


def batches_of(dataset, size, num_workers):
    """All items of a data set in batches, in order. Workers read them if there are many."""
    return DataLoader(
        dataset,
        size,
        collate_fn=as_it_is,
        num_workers=n_workers(min(num_workers, len(dataset) // 1000)),
        generator=torch.Generator(),  # without it, the run's generator would be drawn from
    )


def n_workers(wanted):
    """The number of workers: as wanted, but at most one for each CPU core that is ours to use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return max(0, min(wanted, len(affinity(0)) if affinity else os.cpu_count() or 1))


def as_it_is(batch):
    """Collate function for data sets that return whole batches."""
    return batch

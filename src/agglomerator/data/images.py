"""Images of a data set, decoded in memory or read from their files when asked for."""

import logging
import os
import warnings
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from agglomerator import terminal
from agglomerator.settings import UserError

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it raises what it logs
Image.MAX_IMAGE_PIXELS = 2**25  # it warns of more, and refuses twice as many
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UnreadableImage(UserError):
    """An image file cannot be read. One line, also when PyTorch brings it from another process
    with the traceback of that process in front."""

    def __init__(self, message):
        super().__init__(message.strip().rsplit("UnreadableImage: ", 1)[-1])


class ImageSet(Dataset):
    """Images that lie decoded in memory.

    Indexing by a list of numbers returns their batch, (B, C, H, W) uint8 and labels (B,) int64.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers from 0.
        classes: names of the classes, in the order of labels.
        extra: what else is known, by name: arrays with one row an image, as the `parts` and
            `objects` of every pixel of PartWhole (N, H, W), or the `info` of smallNORB (N, 4).
    """

    def __init__(self, images, labels, classes, extra=None):
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)
        self.extra = extra or {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __getitems__(self, indices):
        return self[indices]


class ImageFiles(Dataset):
    """Images that are read from their files each time, indexed like an `ImageSet`.

    Args:
        paths: of the N files.
        labels: (N,) integers from 0.
        classes: names of the classes, in the order of labels.
        size: side S of the images that come out.
        n_channels: C, 1 or 3.
        skip_unreadable: leave out files that cannot be read, and say so; else they are an error.
    """

    def __init__(self, paths, labels, classes, size, n_channels, skip_unreadable=False):
        # One array, not a million strings, of which every process would come to have its own copy.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)
        self.size, self.n_channels, self.skip_unreadable = size, n_channels, skip_unreadable

    def __len__(self):
        return len(self.paths)

    @property
    def n_bytes(self):
        """Memory that all images take, decoded."""
        return len(self) * self.n_channels * self.size**2

    def __getitem__(self, index):
        """One image (C, S, S) and its label, or a batch of them, for a number or several."""
        if np.ndim(index) == 0:
            return self._read(index), self.labels[index]
        images, read = [], []
        for i in index:
            try:
                images.append(self._read(i))
                read.append(int(i))
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                terminal.write(f"skipped: {error}")
        none = torch.empty(0, self.n_channels, self.size, self.size, dtype=torch.uint8)
        return torch.stack(images) if images else none, self.labels[read]

    def __getitems__(self, indices):
        return self[indices]

    def _read(self, i):
        return read_image(os.fsdecode(self.paths[i]), self.size, self.n_channels)

    def in_memory(self, num_workers):
        """All images as an `ImageSet`, decoded in at most so many processes.

        Raises:
            UnreadableImage: a file cannot be read, and skip_unreadable is not set.
        """
        total, done = len(self), 0
        images = torch.empty(total, self.n_channels, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty_like(self.labels)
        batch = max(1, min(256, 2**22 // (self.n_channels * self.size**2)))
        loader = batches_of(self, batch, num_workers)
        for some, of_some in loader:
            images[done : done + len(some)], labels[done : done + len(some)] = some, of_some
            done += len(some)
        if done < total:
            terminal.write(f"{total - done} of {total} images cannot be read and are left out.")
        return ImageSet(images[:done], labels[:done], self.classes)


def read_image(path, size, n_channels):
    """Read an image file of any format, mode and size that Pillow knows, but PostScript.

    Turned upright as its EXIF orientation says; transparent pixels over white; the middle square,
    resized. The first frame of an animation. 16-bit gray values keep their upper 8 bits.

    Returns:
        (n_channels, size, size) uint8.

    Raises:
        UnreadableImage: it cannot be read.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            image.draft(None, (2 * size, 2 * size))  # large JPEGs need not be decoded in full
            ImageOps.exif_transpose(image, in_place=True)
            image = _in_mode(image, "L" if n_channels == 1 else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # files that are cut short, damaged or absurd raise anything
        reason = " ".join(str(error).replace(repr(str(path)), "").split())
        raise UnreadableImage(
            f"{path}: cannot be read as an image ({reason}); remove it, or leave such files out "
            "by --skip_unreadable."
        ) from None
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(size, size, n_channels).transpose(2, 0, 1).copy())


@lru_cache
def formats():
    """The formats that are read: all but EPS, which is a program that Ghostscript would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _in_mode(image, mode):
    """An image of any mode as L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert(mode)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" and values.max() <= 1:
            values = values * 255
        elif image.mode.startswith("I;16") or values.max() > 255:
            values = values / 256
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.convert(mode)


def batches_of(dataset, size, num_workers):
    """All items of a data set in batches, in order; read in processes if there are many."""
    return DataLoader(
        dataset,
        size,
        collate_fn=as_it_is,
        num_workers=n_workers(min(num_workers, len(dataset) // 1000)),
        generator=torch.Generator(),  # or it would draw from the one of the run
    )


def n_workers(wanted):
    """So many processes, but at most one a CPU core that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    return max(0, min(wanted, len(affinity(0)) if affinity else os.cpu_count() or 1))


def as_it_is(batch):
    """Collation for data sets that return whole batches."""
    return batch

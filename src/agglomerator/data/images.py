"""Images of a data set, decoded in memory or read from their files when asked for."""

import copy
import logging
import os
import sys
import warnings
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it raises what it logs
Image.MAX_IMAGE_PIXELS = 2**25  # it warns of more, and refuses twice as many
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # of text that is not used

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and one of its values
# Colours of 16 bits as files hold them, and what to take them for to get their lower bytes.
LOWER = {f"{mode};16{end}": f"{mode};16{other}" for mode in ("RGB", "RGBA")
         for end, other in ("BL", "LB", "NB" if sys.byteorder == "little" else "NL")}  # fmt: skip
LOWER["LA;16B"] = "RGBA"  # bytes of gray and alpha, upper and lower


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
        groups: (N,) integers: images of one thing, which are not divided between training and
            validation, have the same one. None where each image stands alone.
        paths: (N,) of the files, as bytes; None where there is not one for each image.
    """

    def __init__(self, images, labels, classes, extra=None, groups=None, paths=None):
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.classes = list(classes)
        self.extra = extra or {}
        self.groups, self.paths = groups, paths

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

    groups = None

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
        images, read = self.fetch(index)
        return images, self.labels[read]

    def __getitems__(self, indices):
        return self[indices]

    def fetch(self, index):
        """Of some images those that can be read, (B, C, S, S), and their numbers, a list.

        Raises:
            UnreadableImage: one cannot, and skip_unreadable is not set.
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
        """All images as an `ImageSet`, decoded in at most so many processes.

        Raises:
            UnreadableImage: a file cannot be read, and skip_unreadable is not set.
        """
        total, done = len(self), 0
        images = torch.empty(total, self.n_channels, self.size, self.size, dtype=torch.uint8)
        read = torch.empty_like(self.labels)
        batch = max(1, min(256, 2**22 // (self.n_channels * self.size**2)))
        for some, numbers in batches_of(numbered(self), batch, num_workers):
            images[done : done + len(some)], read[done : done + len(some)] = some, numbers
            done += len(some)
        if done < total:
            say(f"{total - done} of {total} images cannot be read and are left out.")
        read = read[:done]
        return ImageSet(images[:done], self.labels[read], self.classes, paths=self.paths[read])


def numbered(images):
    """A data set with the number of each image as its label: who leaves some out can be asked
    which ones came."""
    found = copy.copy(images)
    found.labels = torch.arange(len(images))
    return found


def read_image(path, size, n_channels):
    """Read an image file of any format, mode and size that Pillow knows, but PostScript.

    Turned upright as its EXIF orientation says; transparent pixels over white; the middle square,
    resized. The first frame of an animation. Values of more than 8 bits are scaled as `to_8_bits`
    says.

    Returns:
        (n_channels, size, size) uint8.

    Raises:
        UnreadableImage: it cannot be read.
    """
    try:
        # By a path, Pillow maps some files into memory and scrambles those that lie on a side.
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            image.draft(None, (2 * size, 2 * size))  # large JPEGs need not be decoded in full
            return _square(_of_8_bits(image, file), size, n_channels)
    except Exception as error:  # files that are cut short, damaged or absurd raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is not known here" if unknown else " ".join(str(error).split())
        raise UnreadableImage(
            f"{path}: cannot be read as an image ({reason}); {_way_out(error)}, or leave such "
            "files out by --skip_unreadable."
        ) from None


def pixels_of(image, size, n_channels):
    """A Pillow image of any mode and size as `read_image` returns it."""
    return _square(_of_8_bits(image.copy()), size, n_channels)


def _square(image, size, n_channels):
    ImageOps.exif_transpose(image, in_place=True)
    image = _in_mode(image, "L" if n_channels == 1 else "RGB")
    pixels = np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.reshape(size, size, n_channels).transpose(2, 0, 1).copy())


def _way_out(error):
    if isinstance(error, Image.DecompressionBombError):
        return "make it smaller"
    if "MAX_TEXT" in str(error):
        return "save it without the text that it carries"
    return "convert it, as to PNG, remove it"


@lru_cache
def formats():
    """The formats that are read: all but EPS, which is a program that Ghostscript would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _in_mode(image, mode):
    """An image of any mode of 8 bits as L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # which Pillow turns it into alone
    return image.convert(mode)


def to_8_bits(values, bits=None):
    """Values of any range as bytes.

    Floats of which none reaches 2 are on the scale 0 to 1. Other values have so many bits, of which
    the upper 8 are kept. Few formats tell how many: the fewest of 8, 10, 12, 14 and 16 that hold
    the greatest value count, or as many as it takes beyond. So a camera's 12 bits in a file of 16
    come out right, and the brightness of a very dark image is lost. Values below 0, infinities and
    what is not a number come out black.

    Args:
        values: array of numbers.
        bits: of a value, where known.

    Returns:
        uint8 array of the same shape.

    Raises:
        ValueError: no value is finite.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("it holds no finite value")
    values = np.where(finite, values, 0)
    greatest = int(values.max())
    if values.dtype.kind == "f" and greatest < 2:
        values = values * 255
    else:
        usual = (n for n in (8, 10, 12, 14, 16) if greatest < 2**n)
        values = values / 2.0 ** ((bits or next(usual, greatest.bit_length())) - 8)
    return np.clip(values, 0, 255).astype(np.uint8)


def _of_8_bits(image, file=None):
    """An image, of an open file, as one with values of 8 bits: itself, unless it has more."""
    raw, clear, bits = _raw_mode(image), image.info.get("transparency"), None
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if raw not in LOWER and image.mode != "F" and not image.mode.startswith("I"):
        if raw in ("L;2", "L;4") and clear is not None:  # Pillow scales the pixels, but not this
            image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw]
        return image
    image.load()  # a TIFF is turned upright here, before its shape is asked for
    if raw not in LOWER:
        values = np.asarray(image)[..., None]
        if raw == "I;32N":
            values = values.view(np.uint32)  # as the file has them
        alpha = values[..., 1:].astype(np.uint8)  # none
        if image.mode != "F" and image.format in ("PPM", "JPEG2000"):
            bits = 16  # Pillow has scaled what the file says to be its range
        elif raw == "I;12":
            bits = 12
    else:
        upper = np.asarray(image)
        if clear is None and upper[..., :3].max() >= 2**6:
            return image  # it needs all 16 bits, of which Pillow keeps the upper 8
        values, alpha = _both_bytes(upper[..., :3], file, LOWER[raw]), upper[..., 3:]
    pixels = to_8_bits(values, bits)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if clear is not None:
        alpha = np.where((values == clear).all(-1, keepdims=True), 0, 255).astype(np.uint8)
    pixels = np.concatenate([pixels, alpha], -1)
    found = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    found.info = {name: known for name, known in image.info.items() if name != "transparency"}
    return found


def _raw_mode(image):
    """Pillow's name for how an opened file holds its values."""
    tile = getattr(image, "tile", None)  # of a file that is not read yet
    args = tile[0].args if tile else None
    return args[0] if isinstance(args, tuple) and args else args


def _both_bytes(upper, file, lower):
    """Colours of 16 bits, of their upper bytes (H, W, 3) and a raw mode for the lower ones."""
    file.seek(0)
    with Image.open(file, formats=("PNG", "TIFF")) as again:
        again.tile = [
            tile._replace(args=(lower, *tile.args[1:]) if isinstance(tile.args, tuple) else lower)
            for tile in again.tile
        ]
        again.load()
        found = np.asarray(again)
    found = found[..., 1:2] if lower == "RGBA" else found[..., :3]
    return upper * np.uint16(256) + found


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

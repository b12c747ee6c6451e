"""smallNORB (LeCun, Huang, Bottou 2004): toys of five classes, photographed by two cameras.

Its files have NYU's binary matrix format, little-endian: a magic number for the type, the number of
dimensions, their sizes (at least three numbers are stored), the values.
"""

import gzip
import math
import shutil
import zlib
from pathlib import Path

import numpy as np

from agglomerator.data.download import fetch, into
from agglomerator.data.images import ImageSet
from agglomerator.util.errors import UserError

URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
CLASSES = ("animal", "human", "airplane", "truck", "car")
NAMES = {
    True: "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat",
    False: "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat",
}
PARTS = ("dat", "cat", "info")
MOST = 24300 * 2 * 96 * 96 + 24  # bytes of the largest of the files
TYPES = {0x1E3D4C54: np.dtype("<i4"), 0x1E3D4C55: np.dtype("u1")}
# SHA-256 of the gzip files, from the lists of TensorFlow Datasets.
SHA256 = {
    (True, "dat"): "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
    (True, "cat"): "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa",
    (True, "info"): "de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32",
    (False, "dat"): "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
    (False, "cat"): "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff",
    (False, "info"): "16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2",
}


def read_smallnorb(settings, train):
    """A split as an `ImageSet`: 48600 gray images of 96x96, from 24300 pairs, of each the left eye
    and then the right one.

    `extra["info"]` is (N, 4): instance, elevation, azimuth, lighting. The images of a toy are a
    group; each class has five toys in a split. So whole toys are held out for validation, and
    validation, like the test, shows toys that the network has never seen.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """
    found = {}
    for part in PARTS:
        path = _find(settings, train, part)
        if path is None:
            raise UserError(
                f"{_folder(settings)}: {NAMES[train].format(part)} is missing; put it there."
            )
        found[part] = read_matrix(path)
    images, labels, info = (found[part] for part in PARTS)
    pairs = len(images)
    shapes = (pairs, 2, *images.shape[2:]), (pairs,), (pairs, 4)
    types = "u1", "<i4", "<i4"
    for part, shape, kind in zip(PARTS, shapes, types, strict=True):
        matrix = found[part]
        if matrix.shape != shape or matrix.dtype != kind or images.ndim != 4 or not matrix.size:
            raise UserError(
                f"{_find(settings, train, part)}: holds {matrix.dtype} {matrix.shape}, which is "
                f"not a {part} file of {pairs} pairs; copy it again."
            )
    images = images.reshape(2 * pairs, 1, *images.shape[2:])
    toys = np.unique(np.stack([labels, info[:, 0]], 1), axis=0, return_inverse=True)[1].reshape(-1)
    extra = {"info": info.repeat(2, axis=0)}
    return ImageSet(images, labels.repeat(2), CLASSES, extra, toys.repeat(2))


def download_smallnorb(settings):
    """Download the missing files: 260 MB in all, 900 MB unpacked.

    Raises:
        UserError: a file cannot be downloaded. The message says where to put it by hand.
    """
    missing = [key for key in SHA256 if _find(settings, *key) is None]
    if not missing:
        return
    way_out = f"put its six files (.mat or .mat.gz) of {URL} into {_folder(settings)}."
    with into(settings.data_dir, "smallNORB", way_out) as temporary:
        folder = temporary / "smallNORB"
        folder.mkdir()
        for train, part in missing:
            name = NAMES[train].format(part)
            packed = temporary / "packed.gz"
            fetch(f"{URL}{name}.gz", packed, SHA256[train, part])
            with gzip.open(packed) as source, (folder / name).open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            packed.unlink()


def read_matrix(path):
    """Read a file in NYU's binary matrix format, packed by gzip or not.

    Returns:
        An array of the type and shape in the file's header.

    Raises:
        UserError: the file is cut short, damaged or of another format.
    """
    path = Path(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = np.frombuffer(file.read(MOST + 1), np.uint8)
        else:
            content = np.fromfile(path, np.uint8, MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again.") from None
    if content.size > MOST:
        raise UserError(f"{path}: is larger than any file of smallNORB; copy it again.")
    magic, n_dims = content[:8].view("<u4").tolist() if content.size >= 20 else (None, 0)
    if magic not in TYPES or not 1 <= n_dims <= 8:
        raise UserError(f"{path}: not in NYU's binary matrix format; copy it again.")
    kind, start = TYPES[magic], 8 + 4 * max(3, n_dims)
    shape = content[8:start].view("<u4").tolist()[:n_dims]
    size = start + math.prod(shape) * kind.itemsize
    if content.size != size:
        raise UserError(
            f"{path}: has {content.size} bytes, but its header promises {size}; copy it again."
        )
    return content[start:].copy().view(kind).reshape(shape)


def _folder(settings):
    return Path(settings.data_dir) / "smallNORB"


def _find(settings, train, part):
    name = NAMES[train].format(part)
    paths = (_folder(settings) / name, _folder(settings) / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)

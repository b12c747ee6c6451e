"""MNIST, FashionMNIST, CIFAR10 and CIFAR100, by torchvision's classes."""

import os
import pickle
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from agglomerator.data.download import into
from agglomerator.data.images import ImageSet
from agglomerator.settings import UserError


def reader(name):
    """A function (settings, train) -> ImageSet for the data set of that name in torchvision."""

    def read(settings, train):
        root = settings.data_dir
        check(name, root)
        try:
            found = getattr(datasets, name)(root, train=train)
        except (RuntimeError, TypeError, AssertionError, OSError, EOFError, KeyError, ValueError,
                pickle.UnpicklingError) as error:  # fmt: skip
            reason = " ".join(str(error).split())
            raise UserError(f"--data_dir={root}: {name} cannot be read: {reason}") from None
        return image_set(found)

    return read


def downloader(name):
    """A function (settings) that downloads what is missing of the data set of that name."""

    def download(settings):
        source, root = getattr(datasets, name), settings.data_dir
        files = files_of(name, root)
        if check(name, root):
            return
        folder = files[0][0].parent
        way_out = f"put its files ({', '.join(path.name for path, _ in files)}) into {folder}."
        with into(root, name, way_out) as temporary:
            source(temporary, train=True, download=True)
            check(name, temporary)
            for packed in temporary.rglob("*.gz"):
                packed.unlink()

    return download


def image_set(found):
    """A torchvision data set with `data`, (N, H, W) or (N, H, W, C), as an `ImageSet`."""
    images = torch.as_tensor(found.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, found.targets, (name.split(" - ")[0] for name in found.classes))


def files_of(name, root):
    """Paths of the files of a data set and their MD5 sums, None where torchvision knows none."""
    source, root = getattr(datasets, name), Path(root)
    if issubclass(source, datasets.MNIST):
        names = [os.path.splitext(packed)[0] for packed, _ in source.resources]
        return [(root / name / "raw" / file, None) for file in names]
    listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return [(root / source.base_folder / file, md5) for file, md5 in listed]


def check(name, root):
    """Whether all files of a data set are there.

    Raises:
        UserError: one of them is damaged; the message names it.
    """
    files = files_of(name, root)
    for path, md5 in files:
        if not path.is_file():
            continue
        if md5 is None:
            check_idx(path)
        elif not check_integrity(path, md5):
            raise UserError(f"{path}: has a wrong checksum; remove it to download it anew.")
    return all(path.is_file() for path, _ in files)


def check_idx(path):
    """Check that an IDX file of bytes is as long as its header says.

    Raises:
        UserError: it is not, or is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        dims = file.read(4 * magic[3]) if len(magic) == 4 else b""
    wanted = 3 if "-idx3-" in path.name else 1
    if magic != bytes((0, 0, 8, wanted)) or len(dims) < 4 * wanted:
        raise UserError(f"{path}: no IDX file; remove it to download it anew.")
    promised = 4 + len(dims)
    values = 1
    for start in range(0, len(dims), 4):
        values *= int.from_bytes(dims[start : start + 4], "big")
    if not values:
        raise UserError(f"{path}: holds nothing; remove it to download it anew.")
    if size != promised + values:
        raise UserError(
            f"{path}: {size} bytes, but its header promises {promised + values}; remove it to "
            "download it anew."
        )

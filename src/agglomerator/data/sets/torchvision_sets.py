"""MNIST, FashionMNIST, CIFAR10 and CIFAR100, read by torchvision's classes."""

import gzip
import os
import pickle
import zlib
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, check_integrity, extract_archive

from agglomerator.data.download import into
from agglomerator.data.images import ImageSet
from agglomerator.util.errors import UserError

LIKE_MNIST = "MNIST", "FashionMNIST", "KMNIST"  # their archives have the same names
MOST = 16 + 60000 * 28 * 28  # bytes of the largest of the files in them


def reader(name):
    """A function (settings, train) -> ImageSet that reads torchvision's data set of that name."""

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
    """A function (settings) that gets the missing files of torchvision's data set of that name:
    from archives in --data_dir, or else by download."""

    def download(settings):
        source, root = getattr(datasets, name), Path(settings.data_dir)
        if check(name, root):
            return
        unpack(name, root)
        if check(name, root):
            return
        missing = [path for path, _ in files_of(name, root) if not path.is_file()]
        packed = _is_packed_as_one(source)
        archives = f"{source.filename} into {root}" if packed else "their .gz files there"
        way_out = (
            f"put its files ({', '.join(path.name for path in missing)}) into "
            f"{missing[0].parent}, or {archives}."
        )
        with into(root, name, way_out) as temporary:
            source(temporary, train=True, download=True)
            check(name, temporary)
            for path in temporary.rglob("*"):  # files that are there stay as they are
                if path.suffix == ".gz" or (root / path.relative_to(temporary)).is_file():
                    path.unlink()

    return download


def unpack(name, root):
    """Unpack the archives of a data set whose files are missing. The archives stay.

    CIFAR's archives lie in the folder `root` itself, those of MNIST and FashionMNIST there, in
    <name>/ or in <name>/raw/.

    Raises:
        UserError: an archive is damaged or of another data set, or the folder cannot be written.
    """
    source, root = getattr(datasets, name), Path(root)
    folder = files_of(name, root)[0][0].parent.relative_to(root)
    if _is_packed_as_one(source):
        found = [root / source.filename] if (root / source.filename).is_file() else []
        if found and not check_integrity(found[0], source.tgz_md5):
            raise UserError(f"{found[0]}: has a wrong checksum; copy it again or remove it.")
    else:
        missing = [path.name for path, _ in files_of(name, root) if not path.is_file()]
        found = [path for file in missing if (path := _archive(name, root, f"{file}.gz"))]
    if not found:
        return
    way_out = "name a folder that you can write to by --data_dir."
    with into(root, name, way_out, "unpacked") as temporary:
        for path in found:
            if _is_packed_as_one(source):
                extract_archive(path, temporary)
            else:
                (temporary / folder).mkdir(parents=True, exist_ok=True)
                _unpack_idx(path, temporary / folder / path.stem)
        check(name, temporary)


def _is_packed_as_one(source):
    return hasattr(source, "tgz_md5")


def _archive(name, root, file):
    """Path of an archive of MNIST or FashionMNIST in one of the three places, or None."""
    of_md5 = {md5: of for of in LIKE_MNIST for _, md5 in getattr(datasets, of).resources}
    for path in (root / name / "raw" / file, root / name / file, root / file):
        if not path.is_file():
            continue
        of = of_md5.get(calculate_md5(path))
        own = path.parent != root  # an archive packed again has another checksum, but this place
        if of == name or (of is None and own):
            return path
        if own:
            raise UserError(
                f"{path}: is an archive of {of}, not of {name}; replace it by the right one."
            )
        if of is None:
            raise UserError(
                f"{path}: has the checksum of no known archive; copy it again, or put it into "
                f"{root / name / 'raw'} if it is right and belongs to {name}."
            )
    return None


def _unpack_idx(path, target):
    try:
        with gzip.open(path) as file:
            target.write_bytes(file.read(MOST + 1))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({error}); copy it again or remove it.") from None
    check_idx(target, path)


def image_set(found):
    """A torchvision data set, whose `data` is (N, H, W) or (N, H, W, C), as an `ImageSet`."""
    images = torch.as_tensor(found.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, found.targets, (name.split(" - ")[0] for name in found.classes))


def files_of(name, root):
    """A list of (path, MD5 sum) of the files of a data set; the sum is None if unknown."""
    source, root = getattr(datasets, name), Path(root)
    if issubclass(source, datasets.MNIST):
        names = [os.path.splitext(packed)[0] for packed, _ in source.resources]
        return [(root / name / "raw" / file, None) for file in names]
    listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return [(root / source.base_folder / file, md5) for file, md5 in listed]


def check(name, root):
    """Whether all files of a data set are there.

    Raises:
        UserError: a file is damaged. The message names it.
    """
    files = files_of(name, root)
    for path, md5 in files:
        if not path.is_file():
            continue
        if md5 is None:
            check_idx(path)
        elif not check_integrity(path, md5):
            raise UserError(f"{path}: has a wrong checksum; remove it to download it again.")
    return all(path.is_file() for path, _ in files)


def check_idx(path, known_as=None):
    """Check that an IDX file of bytes has the length that its header gives.

    Args:
        path: the file.
        known_as: the path for the error message, if it is another one: that of its archive.

    Raises:
        UserError: it has another length, or is not an IDX file.
    """
    named, size = known_as or path, path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        dims = file.read(4 * magic[3]) if len(magic) == 4 else b""
    wanted = 3 if "-idx3-" in path.name else 1
    if magic != bytes((0, 0, 8, wanted)) or len(dims) < 4 * wanted:
        raise UserError(f"{named}: is not an IDX file; remove it to download it again.")
    promised = 4 + len(dims)
    values = 1
    for start in range(0, len(dims), 4):
        values *= int.from_bytes(dims[start : start + 4], "big")
    if not values:
        raise UserError(f"{named}: is empty; remove it to download it again.")
    if size != promised + values:
        raise UserError(
            f"{named}: has {size} bytes, but its header promises {promised + values}; remove it "
            "to download it again."
        )

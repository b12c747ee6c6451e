"""A folder of images: train/<class>/*, test/<class>/*, and val/<class>/* if there is one."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from PIL import Image

from agglomerator.data.images import ImageFiles, formats
from agglomerator.report import say
from agglomerator.settings import UserError

MEMORY_SHARE = 0.4
LAYOUT = "train/<class>/* and test/<class>/*"


def folder_of(settings):
    """The folder that holds train/: data_dir, or data_dir/<dataset>.

    Raises:
        UserError: there is none.
    """
    root = Path(settings.data_dir)
    for folder in (root, root / settings.dataset):
        if (folder / "train").is_dir():
            return folder
    state = "has no train/ folder" if root.is_dir() else "is no folder"
    raise UserError(f"--data_dir={root}: {state}; {settings.dataset} takes images from {LAYOUT}.")


def class_names(settings):
    """Names of the classes: of the folders in train/, sorted."""
    return _listing(folder_of(settings) / "train")[0]


def fingerprint(settings):
    """What the names of all training images, below train/, hash to."""
    folder = folder_of(settings) / "train"
    digest = hashlib.sha256()
    for path in _listing(folder)[1]:
        digest.update(os.fsencode(path[len(str(folder)) :]) + b"\0")
    return digest.hexdigest()


def read_folder(settings, split, size):
    """The images of "train", "val" or "test", in the order of classes and file names.

    Where there is no test/, val/ is the test set. Images are decoded once and kept if all of the
    folder fits into two fifths of the memory; else they are read when needed.

    Returns:
        An `ImageSet` or `ImageFiles` of the settings' channels and the given side, or None for
        "val" where there is no such set.

    Raises:
        UserError: something is wrong with the folder or an image; it is named.
    """
    folder = folder_of(settings)
    names = {"train": "train"}
    if (folder / "test").is_dir():
        names["test"] = "test"
        if (folder / "val").is_dir():
            names["val"] = "val"
    elif (folder / "val").is_dir():
        names["test"] = "val"
    else:
        raise UserError(f"{folder}: has no test/ folder (nor val/); put {LAYOUT} there.")
    if split not in names:
        return None
    classes = _listing(folder / "train")[0]
    n_images = 0
    for name in names.values():
        own, paths, labels = _listing(folder / name)
        n_images += len(paths)
        unknown = [c for c in own if c not in classes]
        if unknown:
            raise UserError(f"{folder / name / unknown[0]}: no such class in {folder / 'train'}.")
        if name == names[split]:
            number = {c: classes.index(c) for c in own}
            found = paths, [number[own[label]] for label in labels]
    files = ImageFiles(*found, classes, size, settings.n_channels, settings.skip_unreadable)
    if n_images * files.n_bytes / len(files) > MEMORY_SHARE * memory() / settings.num_gpus:
        return files
    if len(files) > 5000:
        say(f"Reading {len(files)} images of {folder / names[split]}")
    return files.in_memory(settings.num_workers)


def pages_of_files(settings, rows=8):
    """The images of --images, a file or a folder, a few at a time.

    Yields:
        (images, names): (B, n_channels, image_size, image_size) uint8, and names of the files.

    Raises:
        UserError: there are none, or none that can be read, or one that cannot and skip_unreadable
            is not set.
    """
    s, path = settings, Path(settings.images)
    if not path.exists():
        raise UserError(f"--images={path}: there is no such file or folder.")
    paths = [str(path)] if path.is_file() else _images_below(path)
    if not paths:
        raise UserError(f"--images={path}: there is no image in it.")
    numbers = list(range(len(paths)))
    files = ImageFiles(paths, numbers, paths, s.image_size, s.n_channels, s.skip_unreadable)
    none_read = True
    for start in numbers[::rows]:
        images, read = files[numbers[start : start + rows]]
        if len(images):
            none_read = False
            yield images, [Path(paths[i]).name for i in read]
    if none_read:
        raise UserError(f"--images={path}: none of {len(paths)} files can be read as an image.")


@lru_cache
def _listing(folder):
    """Classes (sorted), paths (sorted by class and name) and labels of the images in a folder."""
    classes, paths, labels = [], [], []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith((".", "__")):
            continue
        found = _images_below(path)
        if not found:
            raise UserError(f"{path}: an empty class: no image in it; add some or remove it.")
        labels += [len(classes)] * len(found)
        paths += found
        classes.append(path.name)
    if folder.name == "train" and len(classes) < 2:
        found = f"one class only, {classes[0]}" if classes else "no folders of classes"
        raise UserError(f"{folder}: holds {found}; put at least two there, as {LAYOUT}.")
    return classes, paths, labels


def _images_below(folder):
    """Paths of the images in a folder and its folders, sorted."""
    readable = formats()
    known = {end for end, kind in Image.registered_extensions().items() if kind in readable}
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in known and not name.startswith(".")
    )


def memory():
    """Bytes of memory of this machine, or of the container if it has less."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        limit = 8 * 2**30
    try:
        return min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return limit

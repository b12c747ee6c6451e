"""A folder of images: train/<class>/*, test/<class>/*, and val/<class>/* if there is one.

The classes are the names of the folders in train/, sorted. Masked pre-training needs none: there
the images may lie anywhere in train/, and test/ may be missing. Images may have any format, size
and mode that `data.images.read_image` takes; how it treats them is told there.
"""

import hashlib
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

from PIL import Image

from agglomerator.data.decode import formats
from agglomerator.data.images import ImageFiles
from agglomerator.util.errors import UserError
from agglomerator.util.machine import memory, processes_here
from agglomerator.util.terminal import say

MEMORY_SHARE = 0.4
UNLABELLED = "unlabelled"  # the one class of images without classes
LAYOUT = "train/<class>/* and test/<class>/*"
# Folders and files that systems add. Names that begin with a dot are hidden, too.
OF_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information",
              "lost+found", "Thumbs.db", "desktop.ini"}  # fmt: skip


def folder_of(settings):
    """The folder that holds train/: data_dir or data_dir/<dataset>.

    Raises:
        UserError: neither holds train/.
    """
    root = Path(settings.data_dir)
    for folder in (root, root / settings.dataset):
        if (folder / "train").is_dir():
            return folder
    state = "has no train/ folder" if root.is_dir() else "is not a folder"
    raise UserError(f"--data_dir={root}: {state}; {settings.dataset} reads images from {LAYOUT}.")


def class_names(settings):
    """Names of the classes: those of the folders in train/, sorted; for masked pre-training one
    class if there are less than two folders."""
    folder = folder_of(settings)
    return _lister(settings, folder)(folder / "train")[0]


def fingerprint(settings):
    """SHA-256 of the names of all training images, as a hexadecimal string."""
    folder = folder_of(settings)
    return _fingerprint(folder / "train", _lister(settings, folder))


def n_training_images(settings):
    """Number of training images without those that --val_share holds out where there is no val/."""
    folder = folder_of(settings)
    n_images = len(_lister(settings, folder)(folder / "train")[1])
    own = "val" in splits_of(folder, tested=False)
    return n_images if own else n_images - round(settings.val_share * n_images)


@lru_cache
def _fingerprint(folder, lister):
    digest = hashlib.sha256()
    for path in lister(folder)[1]:
        digest.update(os.fsencode(path[len(str(folder)) :]) + b"\0")
    return digest.hexdigest()


def splits_of(folder, tested=True):
    """Which folder below a data set's holds "train", "test" and, if it has its own, "val".

    Raises:
        UserError: there is neither test/ nor val/; not unless `tested`.
    """
    has = {name for name in ("test", "val") if os.path.isdir(folder / name)}
    if not has and tested:
        raise UserError(f"{folder}: has no test/ folder (nor val/); put {LAYOUT} there.")
    if has == {"val"}:
        return {"train": "train", "test": "val"}
    return {"train": "train"} | {name: name for name in sorted(has)}


def tested_folder(folder):
    """Name of the folder of the test images below a data set's: "val" if there is no test/."""
    return splits_of(Path(folder), tested=False).get("test", "test")


def has_masks(folder, split=None):
    """Whether a folder has images in `split`/ and a folder of masks for them (`data/masks.py`);
    None for the split of the test images."""
    kinds, split = ("parts", "objects"), split or tested_folder(folder)
    places = (os.path.join(folder, kind, split) for kind in kinds)
    return os.path.isdir(os.path.join(folder, split)) and any(map(os.path.isdir, places))


def read_folder(settings, split, size):
    """The images of "train", "val" or "test", in the order of classes and file names.

    Without a test/ folder, val/ is the test set. If the whole folder fits into two fifths of the
    memory (divided by the processes of this machine), images are decoded once and kept; if not,
    they are read when needed. Files of other formats are left out, and a line says how many.

    Args:
        settings: of the run.
        split: "train", "val" or "test".
        size: side of the images that come out, in pixels.

    Returns:
        An `ImageSet` or `ImageFiles` of n_channels, size x size; None for "val" if there is no
        such folder, and in masked pre-training for "test".

    Raises:
        UserError: something is wrong with the folder or an image. The message names it.
    """
    folder = folder_of(settings)
    names = splits_of(folder, tested=settings.stage != "masked")
    if split not in names:
        return None
    lister = _lister(settings, folder)
    classes = lister(folder / "train")[0]
    n_images = 0
    for name in names.values():
        own, paths, labels = lister(folder / name)
        n_images += len(paths)
        unknown = [c for c in own if c not in classes]
        if unknown:
            raise UserError(
                f"{folder / name / unknown[0]}: no such class in {folder / 'train'}; add it there, "
                "or remove it here."
            )
        if not paths:
            raise UserError(
                f"{folder / name}: holds no folder of a class with images; use "
                f"{folder / name}/<class>/*, as in {folder / 'train'}, or remove it."
            )
        if name == names[split]:
            number = {c: classes.index(c) for c in own}
            found = paths, [number[own[label]] for label in labels]
    files = ImageFiles(*found, classes, size, settings.n_channels, settings.skip_unreadable)
    n_bytes = n_images * files.n_bytes / len(files)
    if n_bytes > MEMORY_SHARE * memory() / processes_here(settings):
        return files
    if len(files) > 5000:
        say(f"Reading {len(files)} images of {folder / names[split]}")
    return files.in_memory(settings.num_workers)


def files_of_images(settings, size):
    """The images of --images, a file or a folder; of a folder that has masks beside its test/
    (`data/masks.py`), those in test/.

    Args:
        settings: of the run.
        size: side of the images that come out, in pixels.

    Returns:
        `ImageFiles`, whose labels are the numbers of the images.

    Raises:
        UserError: there is no image.
    """
    s, path = settings, Path(settings.images)
    if not path.exists():
        raise UserError(f"--images={path}: there is no such file or folder; check the path.")
    masked = has_masks(path)
    within = path / tested_folder(path) if masked else path
    paths, others = ([str(path)], Counter()) if path.is_file() else images_below(within)
    if not paths:
        raise UserError(f"--images={path}: there is no image in it{_no_images(others)}.")
    if others:
        say(f"--images={path}: left out{_no_images(others)}.")
    numbers = list(range(len(paths)))
    return ImageFiles(paths, numbers, paths, size, s.n_channels, s.skip_unreadable)


def _lister(settings, folder):
    """What lists the images of a folder in that of a data set, `_listing` or `_unlabelled`."""
    if settings.stage != "masked":
        return _listing
    entries = _entries(folder / "train")
    return _listing if sum(path.is_dir() for path in entries) > 1 else _unlabelled


@lru_cache
def _unlabelled(folder):
    """The same as `_listing`, of all images below a folder as one class."""
    paths, others = images_below(folder)
    if not paths:
        raise UserError(f"{folder}: no image in it{_no_images(others)}; put images there.")
    if others:
        say(f"{folder}: left out{_no_images(others)}.")
    return [UNLABELLED], paths, [0] * len(paths)


@lru_cache
def _listing(folder):
    """Classes (sorted), paths (sorted by class and name) and labels of the images in a folder."""
    classes, paths, labels, others = [], [], [], Counter()
    top, known = os.path.realpath(folder), _endings()
    entries = sorted(_entries(folder))
    for path in entries:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link that leads nowhere; correct it or remove it.")
        if not path.is_dir() or not _is_to_read(str(path), top, set()):
            continue
        found, no_images = images_below(path, top)
        if not found:
            raise UserError(
                f"{path}: an empty class: no image in it{_no_images(no_images)}; add images or "
                "remove the folder."
            )
        labels += [len(classes)] * len(found)
        paths += found
        others += no_images
        classes.append(path.name)
    if folder.name == "train" and len(classes) < 2:
        found = f"one class only, {classes[0]}" if classes else "no folders of classes"
        raise UserError(
            f"{folder}: holds {found}; at least two are needed, as in {LAYOUT} (none for "
            "--pretraining=masked)."
        )
    if others:
        say(f"{folder}: left out{_no_images(others)}.")
    loose = sum(path.suffix.lower() in known for path in entries if not path.is_dir())
    if loose:
        say(f"{folder}: left out images that lie in no folder of a class: {loose}.")
    return classes, paths, labels


def _entries(folder):
    try:
        return [path for path in folder.iterdir() if not is_hidden(path.name)]
    except OSError as error:
        _refuse(error)


def images_below(folder, top=None):
    """The images in a folder and the folders below it. Each folder is read once.

    Args:
        folder: folder to read; links to folders are followed.
        top: real path of the folder above that is read as a whole, or None.

    Returns:
        (paths, others): sorted paths of images, and the number of other files by ending.

    Raises:
        UserError: one of the folders cannot be read.
    """
    seen, top = {os.path.realpath(folder)}, top or os.path.realpath(folder)
    paths, others, known = [], Counter(), _endings()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [
            name for name in sorted(folders) if _is_to_read(os.path.join(place, name), top, seen)
        ]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in known and not is_hidden(name):
                paths.append(os.path.join(place, name))
            elif not is_hidden(name):
                others[ending or "without an ending"] += 1
    return sorted(paths), others


def _endings():
    """The endings of files that can be read."""
    readable = formats()
    return {end for end, kind in Image.registered_extensions().items() if kind in readable}


def is_hidden(name):
    """Whether a file or folder of this name is none of the user's."""
    return name.startswith(".") or name in OF_SYSTEMS


def _is_to_read(path, top, seen):
    """Whether to read a folder; if so, it is added to `seen`.

    Hidden folders and those in `seen` are not read. A link is not read if it leads to a folder
    above it, or to one below the top, which is read anyway.
    """
    real = os.path.realpath(path)
    leads_back = os.path.islink(path) and (
        _is_within(real, top)
        or _is_within(top, real)
        or _is_within(os.path.realpath(os.path.dirname(path)), real)
    )
    if is_hidden(os.path.basename(path)) or leads_back or real in seen:
        return False
    seen.add(real)
    return True


def _is_within(path, folder):
    return Path(path).is_relative_to(folder)


def _refuse(error):
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror}); allow access to it, or remove it."
    ) from None


def _no_images(others):
    """The end of a sentence about files that are left out: how many, and how to convert them."""
    if not others:
        return ""
    most_first = sorted(others.items(), key=lambda of: (-of[1], of[0]))
    counts = ", ".join(f"{n} {ending}" for ending, n in most_first)
    return (
        f", since files of these endings are not read here: {counts}; convert those that are "
        "images, as to PNG (ImageMagick: magick mogrify -format png FILES)"
    )

"""Masks of true segments: those that lie beside a folder of images, and those of drawn scenes.

The parts of an image DIR/test/<class>/x.jpg are DIR/parts/test/<class>/x.png, its objects
DIR/objects/test/<class>/x.png; train and val alike. A mask is a PNG of one channel or a palette,
of the size of the upright image: 0 background, 1 to 254 the segments; 255 is ignored. An image
may have both masks, one or none. Masks score islands. Nothing in training reads them.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from agglomerator.data import registry
from agglomerator.data.decode import upright_size
from agglomerator.data.images import ImageFiles, numbered
from agglomerator.data.limits import chosen
from agglomerator.data.sets import folder as folders
from agglomerator.data.transforms import center_crop, normalize
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

MASKS = "parts", "objects"
NOWHERE = 255  # the value of pixels that do not count
SCENES = 1000  # how many drawn scenes are scored
_MODES = "1", "L", "P"  # of Pillow, those of one channel of at most 8 bits
_SCALES = {"L;2": 85, "L;4": 17}  # Pillow multiplies the values of such files


class MaskFiles:
    """Masks that are read from their files at each use.

    Args:
        paths: of the N masks; None for an image without one.
        images: paths of the N images.
        size: side S of the masks that come out, and of the images that they belong to.

    Attributes:
        known: (N,) bool, which images have a mask.
    """

    def __init__(self, paths, images, size):
        self.paths = np.array([os.fsencode(path or "") for path in paths])
        self.images, self.size = images, size
        self.known = self.paths != b""

    def __getitem__(self, rows):
        """The masks of some images, (B, S, S) uint8; `NOWHERE` for an image without one.

        Raises:
            UserError: a file cannot be read, or is no such mask; the message names it.
        """
        masks = np.full((len(rows), self.size, self.size), NOWHERE, np.uint8)
        for mask, i in zip(masks, rows, strict=True):
            if self.known[i]:
                path, image = os.fsdecode(self.paths[i]), os.fsdecode(self.images[i])
                mask[:] = read_mask(path, image, self.size)
        return masks


def read_mask(path, image, size):
    """Read a mask as its image is read: the middle square, resized, here by nearest neighbour.

    Args:
        path: of the mask.
        image: path of its image.
        size: side of the mask that comes out.

    Returns:
        (size, size) uint8.

    Raises:
        UserError: the file cannot be read, is no PNG of one channel of 8 bits, or not of the
            image's size.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=("PNG",)) as mask:
            raw = mask.tile[0].args
            mask.load()
    except Exception as error:  # damaged files raise anything
        raise UserError(
            f"{path}: cannot be read as a mask ({' '.join(str(error).split())}); save it as a PNG "
            "of one channel, or remove it."
        ) from None
    if mask.mode not in _MODES:
        raise UserError(
            f"{path}: a mask of mode {mask.mode}; save it with one channel of 8 bits: 0 "
            "background, 1 to 254 the segments, 255 is ignored."
        )
    upright = upright_size(image)
    if mask.size != upright:
        of_mask, of_image = ("x".join(map(str, each)) for each in (mask.size, upright))
        raise UserError(f"{path}: a mask of {of_mask}, but {image} has {of_image}; save it so.")
    values = np.asarray(mask).astype(np.uint8) // _SCALES.get(raw, 1)
    return np.asarray(ImageOps.fit(Image.fromarray(values), (size, size), Image.Resampling.NEAREST))


def masks_beside(folder, split, images, size):
    """The masks beside the images of a folder. A line tells of masks without an image.

    Args:
        folder: path that holds the images in <split>/ and the masks in parts/<split>/ or
            objects/<split>/, or neither.
        split: name of the folder of the images, as "test".
        images: paths of the N images, as bytes or str.
        size: side of the masks that come out.

    Returns:
        A dictionary of `MaskFiles`, with the keys "parts", "objects", one of them or none.

    Raises:
        UserError: there are files, but no image has a mask, or two have the same.
    """
    found, images = {}, [os.fsdecode(path) for path in images]
    for kind in MASKS:
        place = folder / kind / split
        if not place.is_dir():
            continue
        wanted, paths = _mask_paths(folder, kind, split, images)
        for path, n in Counter(paths).items():
            if path is not None and n > 1:
                raise UserError(f"{path}: the mask of {n} images; give each image its own name.")
        left = sorted(_files_below(place) - set(paths))
        if not any(paths):
            what = f"{left[0]}: no image has this name" if left else f"{place}: no masks in it"
            raise UserError(
                f"{what}; the {kind} of {images[0] if images else split} should be "
                f"{_first(wanted)}."
            )
        if left:
            say(f"{place}: left out {len(left)} files that are no mask of an image, as {left[0]}.")
        found[kind] = MaskFiles(paths, images, size)
    return found


def _mask_paths(folder, kind, split, images):
    """Paths that the masks of images should have, and the same with None where there is none."""
    names = [os.path.relpath(path, folder / split) for path in images]
    wanted = [f"{os.path.splitext(folder / kind / split / name)[0]}.png" for name in names]
    return wanted, [path if os.path.isfile(path) else None for path in wanted]


def masks_of(paths, folder, settings):
    """The masks of some test images of a folder, for pictures.

    Args:
        paths: of the B images.
        folder: path that holds them in test/, or in val/ if there is none.
        settings: of the run.

    Returns:
        A dictionary of (B, S, S) uint8 arrays, S = image_size, with the keys "parts", "objects" or
        one of them; None if no masks lie beside it.
    """
    if not folders.has_masks(folder):
        return None
    masks = {}
    for kind in MASKS:
        _, found = _mask_paths(folder, kind, folders.tested_folder(folder), paths)
        if any(found):
            files = MaskFiles(found, paths, registry.side_of(settings))
            masks[kind] = _middle(files[range(len(paths))], settings).numpy()
    return masks


def _middle(masks, settings):
    """What the network sees of masks (B, H, H): (B, S, S), S = image_size."""
    return center_crop(torch.as_tensor(masks)[:, None], settings.image_size)[:, 0]


def _first(paths):
    return paths[0] if paths else "of its name"


def _files_below(folder):
    """Paths of the files in a folder and below it, without those that systems add."""
    return {
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if not folders.is_hidden(name)
    }


class MaskedImages:
    """Images with the masks of their true segments, in batches.

    Args:
        images: `ImageSet` or `ImageFiles`.
        masks: a dictionary of `MaskFiles`, or of arrays (N, H, W), with the keys "parts",
            "objects", or one of them.
        rows: indices of the images to take; those without any mask are left out.
        settings: of the run.
    """

    def __init__(self, images, masks, rows, settings):
        known = np.zeros(len(images), bool)
        for mask in masks.values():
            known |= getattr(mask, "known", True)
        self.images, self.masks, self.settings = numbered(images), masks, settings
        self.rows = [row for row in rows if known[row]]

    def __len__(self):
        return len(self.rows)

    def batches(self, size):
        """Yield (images, masks): (B, C, S, S) uint8, and a dictionary of (B, S, S) uint8. S is
        image_size. Images that cannot be read may be left out.

        Args:
            size: greatest B.
        """
        s = self.settings
        for rows in torch.as_tensor(self.rows).split(size):
            images, read = self.images[rows]
            read = read.numpy()  # numpy takes a tensor of one index for a number
            masks = {name: mask[read] for name, mask in self.masks.items()}
            if len(images):
                masks = {name: _middle(mask, s) for name, mask in masks.items()}
                yield center_crop(images, s.image_size), masks

    def view(self, images):
        """uint8 images -> the network's input."""
        return normalize(images, *registry.normalization_of(self.settings))


def of_test(data):
    """The test images of a run that have masks, as --limit_test leaves them; of drawn scenes at
    most `SCENES`.

    Args:
        data: `ImageDataModule`, set up.

    Returns:
        `MaskedImages`, or None if no image has a mask.

    Raises:
        UserError: something is wrong with the masks' folders.
    """
    settings, images, rows = data.settings, data.test.dataset, data.test.indices
    if data.entry.read is not None:
        masks = {name: images.extra[name] for name in MASKS if name in images.extra}
        rows = rows[:SCENES]
    else:
        folder = folders.folder_of(settings)
        split, size = folders.tested_folder(folder), registry.side_of(settings)
        masks = masks_beside(folder, split, images.paths, size)
    if not masks:
        return None
    found = MaskedImages(images, masks, rows, settings)
    if not len(found):
        say("None of the tested images has a mask: the islands are scored without.")
    return found or None


def of_folder(settings):
    """The test images of a folder that have masks, whatever their classes. The folder is that of
    --images, or else that of the data set.

    Returns:
        `MaskedImages`, or None if there are no masks.

    Raises:
        UserError: something is wrong with the folder.
    """
    s, folder = settings, masked_folder(settings)
    if folder is None:
        return None
    split = folders.tested_folder(folder)
    paths = folders.images_below(folder / split)[0]
    size = registry.side_of(s)
    masks = masks_beside(folder, split, paths, size)
    numbers = range(len(paths))
    images = ImageFiles(paths, numbers, paths, size, s.n_channels, s.skip_unreadable)
    if not masks:
        return None
    rows = chosen(s, "test", len(paths)).tolist()
    if len(rows) < len(paths):
        say(f"--limit_test={s.limit_test}: {len(rows)} of {len(paths)} test images are scored.")
    found = MaskedImages(images, masks, rows, s)
    if not len(found):
        say("None of these images has a mask: no islands are scored.")
    return found or None


def masked_folder(settings):
    """The folder of `of_folder`, if it has test images and masks beside them; else None."""
    if settings.images is not None:
        folder = Path(settings.images)
    elif registry.entry_of(settings).read is None:
        folder = folders.folder_of(settings)
    else:
        return None
    return folder if folders.has_masks(folder) else None


def of_training(settings, most=SCENES):
    """The masks of training images, for what may know where segments mostly lie.

    Args:
        settings: of the run.
        most: how many to take, evenly spaced.

    Returns:
        A dictionary of (N, S, S) uint8 arrays, S = image_size, with the keys "parts", "objects",
        one of them or none.
    """
    s = settings
    if s.images is None and registry.entry_of(s).read is not None:
        draw = registry.entry_of(s).masks
        return {} if draw is None else draw(s, most)
    folder = Path(s.images) if s.images is not None else folders.folder_of(s)
    if not folders.has_masks(folder, "train"):
        return {}
    paths = folders.images_below(folder / "train")[0]
    masks = {}
    for name, files in masks_beside(folder, "train", paths, registry.side_of(s)).items():
        rows = np.flatnonzero(files.known)
        rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
        masks[name] = _middle(files[rows], s).numpy()
    return masks

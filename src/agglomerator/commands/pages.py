"""The images that a command shows, a page at a time: test images, or the user's own."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from agglomerator.commands.build import build_data
from agglomerator.data import registry
from agglomerator.data.images import numbered, photographs
from agglomerator.data.masks import MASKS, masks_of
from agglomerator.data.sets.folder import files_of_images, folder_of, has_masks, tested_folder
from agglomerator.data.transforms import center_crop, normalize
from agglomerator.islands.inspection import finite, states_of
from agglomerator.islands.live_view import sample_rows
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

ROWS = 8  # most images on a page


class Page(NamedTuple):
    """Some images.

    Attributes:
        images: (B, C, H, W) uint8, for the network.
        shown: B images (C, H', W') uint8, the same for people.
        names: of the images.
        masks: their true segments, a dictionary of (B, H, W) integers; None where not known.
    """

    images: torch.Tensor
    shown: object
    names: list
    masks: dict | None

    def states(self, model, settings):
        """What a network sees in them, (T + 1, B, n, K, d).

        Raises:
            UserError: it is not finite.
        """
        mean, std = registry.normalization_of(settings)
        return finite(states_of(model, normalize(self.images, mean, std)))


def images_of(plan, with_numbers=False):
    """The images of a run: `OwnImages`, or `TestImages` with or without numbers in their names."""
    images = plan.settings.images
    if images is not None and numbers_in(images) is None:
        return OwnImages(plan.settings)
    return TestImages(plan, with_numbers or images is not None)


def pages_of(images):
    """The pages of those of `OwnImages` or `TestImages` that are drawn.

    Yields:
        A `Page` with ROWS images at most.

    Raises:
        UserError: none of them can be read.
    """
    numbers, none_read = images.drawn(), True
    for start in range(0, len(numbers), ROWS):
        page = images[numbers[start : start + ROWS]]
        if len(page.images):
            none_read = False
            yield page
    if none_read:
        of = images.settings.images
        named = f"--data_dir={images.settings.data_dir}" if of is None else f"--images={of}"
        raise UserError(f"{named}: none of {len(numbers)} files can be read as an image.")


class OwnImages:
    """The images of --images, a file or a folder.

    Args:
        settings: of the run.

    Raises:
        UserError: there are none.
    """

    name, subject = "images", "own images"

    def __init__(self, settings):
        self.settings = settings
        self.files = files_of_images(settings, registry.side_of(settings))

    def __len__(self):
        return len(self.files)

    def drawn(self):
        """The numbers of the images that are drawn: all, but of a folder with masks ROWS."""
        n, path = len(self), Path(self.settings.images)
        if n <= ROWS or not has_masks(path):
            return range(n)
        say(f"--images={path}: {ROWS} of the {n} images in {tested_folder(path)}/ are drawn.")
        return [i * n // ROWS for i in range(ROWS)]

    def __getitem__(self, numbers):
        """The `Page` of the images of some numbers that can be read.

        Raises:
            UserError: one cannot be read, and skip_unreadable is not set.
        """
        s = self.settings
        images, read = self.files.fetch(numbers)
        paths = [os.fsdecode(self.files.paths[i]) for i in read]
        shown = photographs(paths, s, registry.entry_of(s).margin)
        names, masks = [Path(path).name for path in paths], masks_of(paths, Path(s.images), s)
        return Page(center_crop(images, s.image_size), shown, names, masks)


class TestImages:
    """The test images that --images numbers, or all.

    Args:
        plan: of the run.
        with_numbers: the names begin with the places of the images in the test set.

    Raises:
        UserError: there are none, or none of these numbers.
    """

    __test__ = False  # pytest would take it for a test
    name = "test"

    def __init__(self, plan, with_numbers):
        self.settings, self.data = plan.settings, build_data(plan)
        self.with_numbers = with_numbers
        self.subject = f"{self.settings.dataset}, test images"
        self.data.check_test()
        ranges, n_images = numbers_in(self.settings.images), len(self.data.whole("test"))
        self.named = ranges is not None
        self.rows = _within(ranges, n_images, self.settings) if self.named else range(n_images)

    def __len__(self):
        return len(self.rows)

    def drawn(self):
        """The numbers of the images that are drawn: those of --images, or the first of some
        classes."""
        if self.named:
            return range(len(self))
        return sample_rows(self.data.test, len(self.data.classes)).tolist()

    def __getitem__(self, numbers):
        """The `Page` of the images of some numbers that can be read."""
        data, s = self.data, self.settings
        dataset = data.test.dataset
        images, rows = numbered(dataset)[[self.rows[number] for number in numbers]]
        names = [data.classes[label] for label in dataset.labels[rows]]
        if self.with_numbers:
            names = [f"{row} {name}" for row, name in zip(rows.tolist(), names, strict=True)]
        images = shown = data.crop(images)
        if dataset.paths is not None:
            paths = [os.fsdecode(path) for path in dataset.paths[rows.numpy()]]
            shown = photographs(paths, s, data.entry.margin)
            return Page(images, shown, names, masks_of(paths, folder_of(s), s))
        known = [name for name in MASKS if name in getattr(dataset, "extra", {})]
        masks = {name: np.asarray(dataset.extra[name])[rows.numpy()] for name in known}
        return Page(images, shown, names, masks)


def numbers_in(images):
    """The numbers that --images names, as "3,10-12", as ranges; None if it names none, or a
    file."""
    ranges = r"\d{1,9}(-\d{1,9})?"
    if not re.fullmatch(f"{ranges}(,{ranges})*", images or "") or os.path.exists(images):
        return None
    ends = ([int(end) for end in part.split("-")] for part in images.split(","))
    return [range(first, last[0] + 1 if last else first + 1) for first, *last in ends]


def _within(numbers, n_images, settings):
    """The numbers in some ranges, as a list.

    Raises:
        UserError: the test set has no such image.
    """
    for some in numbers:
        if not some or some[-1] >= n_images:
            raise UserError(
                f"--images={settings.images}: {settings.dataset} has the test images 0 to "
                f"{n_images - 1}; name some of these, as 0,2-4."
            )
    return [number for some in numbers for number in some]

"""`--mode=islands`: pictures of the islands of a trained network."""

import os
import re
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.build import build_data, build_network
from agglomerator.commands.evaluate import score_folder
from agglomerator.commands.report import tell_blindness
from agglomerator.commands.video import draw_video
from agglomerator.config.pictures import FIGURE_FORMATS
from agglomerator.data import registry
from agglomerator.data.images import numbered, photographs
from agglomerator.data.masks import MASKS, masks_of
from agglomerator.data.sets.folder import folder_of, pages_of_files
from agglomerator.data.transforms import center_crop, normalize
from agglomerator.islands.album import Album
from agglomerator.islands.figures import evenly_spaced
from agglomerator.islands.inspection import finite, joined, states_of
from agglomerator.islands.live_view import sample_rows
from agglomerator.plan import resolve
from agglomerator.runs.record import clear, lock_run_folder, make_room
from agglomerator.util.errors import UserError
from agglomerator.util.files import write_json
from agglomerator.util.terminal import say

ROWS = 8  # most images on a page
GRID = 8  # most pages in a grid


@rank_zero_only
def islands(settings, given):
    """Draw the islands of a checkpoint's network, of test images or of the user's own; score them
    where masks lie beside a folder's images."""
    plan = resolve(settings, given, "islands")
    settings, model = plan.settings, build_network(plan)
    lock_run_folder(plan.folder.path, "islands")
    if settings.video:
        draw_video(plan, model)
        return
    tell_blindness(settings)
    album = Album(plan.folder.islands, **settings.found_by, projection=plan.folder.projection)
    numbers = numbers_in(settings.images)
    if settings.images is None or numbers is not None:
        pages = _of_test(build_data(plan), numbers)
        kind, subject = "test", f"{settings.dataset}, test images"
    else:
        pages, kind, subject = own_pages(settings), "images", "own images"
    record = plan.folder.islands / f"{kind}.json"
    pictures = [
        path for end in FIGURE_FORMATS for path in plan.folder.islands.glob(f"{kind}*.{end}")
    ]
    title, drawn, written = f"Islands of agreement, {settings.exp_name}\n{subject}", [], set()
    for number, (images, shown, names, masks) in enumerate(pages, 1):
        if number == 1:  # there is one
            made = make_room([record, *pictures], plan.folder.path, settings, plan.start)
        name = kind if number == 1 else f"{kind}_{number}"
        seen = album.islands(shown, names, states_of_images(model, images, settings), masks)
        figures = {
            "": seen.draw_levels(title=title),
            "_iterations": seen.draw_iterations(title=title),
        }
        written |= write(album, name, figures, settings)
        drawn.append(seen)
        if len(drawn) == GRID:
            written |= write_grids(album, kind, drawn, title, settings, number)
            drawn = []
    if drawn:
        written |= write_grids(album, kind, drawn, title, settings, number)
    clear([path for path in pictures if path not in written], plan.folder.path, kind)
    write_json(record, {"checkpoint": plan.start.name} | made)
    score_folder(plan, model)


def write_grids(album, kind, drawn, title, settings, number):
    """Write a grid of the images of some pages for each level: the borders of its islands.

    Args:
        drawn: the `Islands` of the pages.
        number: of the last page.

    Returns:
        The paths of the pictures, a set.
    """
    islands = joined(drawn)
    end = f"_{-(-number // GRID)}" if number > GRID else ""
    levels = evenly_spaced(islands.states.shape[3])
    figures = {f"_level{level}{end}": islands.draw_grid(level, title=title) for level in levels}
    return write(album, kind, figures, settings)


def write(album, name, figures, settings):
    """Write figures, by the ends of their names, into an album, and say so; returns their paths, a
    set."""
    paths = []
    for end, figure in figures.items():
        paths += album.write(name + end, figure, settings.figure_kinds, settings.figure_dpi)
    say("Written: " + ", ".join(map(str, paths)))
    return set(paths)


def states_of_images(model, images, settings):
    """States (T + 1, B, n, K, d) of images (B, C, H, W) uint8.

    Raises:
        UserError: they are not finite.
    """
    return finite(states_of(model, normalize(images, *registry.normalization_of(settings))))


def own_pages(settings):
    """Pages of the user's images: images (B, C, H, W) for the network, the same for people, names,
    and true segments, None if masks do not lie beside the images."""
    for images, paths in pages_of_files(settings, registry.side_of(settings), ROWS):
        yield page_of_files(images, paths, settings)


def page_of_files(images, paths, settings):
    """What is shown of image files that were read, like the pages of `own_pages`."""
    s, names = settings, [Path(path).name for path in paths]
    shown = photographs(paths, s, registry.entry_of(s).margin)
    return center_crop(images, s.image_size), shown, names, masks_of(paths, Path(s.images), s)


def _of_test(data, numbers=None):
    """Pages of test images, as `own_pages` has them, with true segments where they are known.

    Args:
        data: of the run.
        numbers: of the images in the test set. None for the first of some classes.
    """
    data.check_test()
    rows = sample_rows(data.test, len(data.classes)) if numbers is None else rows_of(data, numbers)
    pages = (page_of_test(data, page, numbers is not None) for page in rows.split(ROWS))
    read = None
    for read in filter(lambda page: len(page[0]), pages):
        yield read
    if read is None:
        raise UserError("None of these test images can be read; see the lines above.")


def page_of_test(data, rows, with_numbers=True):
    """Test images, like the pages of `own_pages`.

    Args:
        data: of the run.
        rows: (B,), indices of the test images' data set.
        with_numbers: their names begin with these.
    """
    dataset = data.test.dataset
    images, rows = numbered(dataset)[rows]
    images, names = data.crop(images), [data.classes[label] for label in dataset.labels[rows]]
    if with_numbers:
        names = [f"{row} {name}" for row, name in zip(rows.tolist(), names, strict=True)]
    if dataset.paths is not None:
        paths, s = dataset.paths[rows.numpy()], data.settings
        shown = photographs(paths, s, data.entry.margin)
        masks = masks_of([os.fsdecode(path) for path in paths], folder_of(s), s)
        return images, shown, names, masks
    known = [name for name in MASKS if name in getattr(dataset, "extra", {})]
    masks = {name: np.asarray(dataset.extra[name])[rows.numpy()] for name in known}
    return images, images, names, masks


def rows_of(data, numbers=None):
    """Indices (N,) of the test images of some numbers, ranges as `numbers_in` gives them, or of
    all.

    Raises:
        UserError: the test set has no such image.
    """
    rows = torch.as_tensor(list(data.whole("test").indices))
    return rows if numbers is None else rows[_within(numbers, len(rows), data.settings)]


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

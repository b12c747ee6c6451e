"""`--mode=islands`: pictures of the islands of a trained network."""

import re
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.build import build_data, build_network
from agglomerator.commands.evaluate import score_folder
from agglomerator.commands.report import tell_blindness
from agglomerator.config.pictures import FIGURE_FORMATS
from agglomerator.data import registry
from agglomerator.data.images import numbered, photographs
from agglomerator.data.masks import MASKS, masks_of
from agglomerator.data.sets.folder import pages_of_files
from agglomerator.data.transforms import normalize
from agglomerator.islands.figures import IslandFigures
from agglomerator.islands.live_view import sample_rows
from agglomerator.plan import resolve
from agglomerator.runs.record import lock_run_folder, make_room
from agglomerator.util.errors import UserError
from agglomerator.util.files import write_json
from agglomerator.util.terminal import say

ENDS = "", "_iterations"  # of the names of the two pictures of a page
ROWS = 8  # most images on a page


@rank_zero_only
def islands(settings, given):
    """Draw the islands of a checkpoint's network, of test images or of the user's own; score them
    where masks lie beside a folder's images."""
    plan = resolve(settings, given, "islands")
    settings, model = plan.settings, build_network(plan)
    lock_run_folder(plan.folder.path, "islands")
    tell_blindness(settings)
    drawn = IslandFigures(plan.folder.islands, **settings.found_by)
    numbers = _numbers(settings.images)
    if settings.images is None or numbers is not None:
        pages = _of_test(build_data(plan), numbers)
        kind, subject = "test", f"{settings.dataset}, test images"
    else:
        pages, kind, subject = _own(settings), "images", "own images"
    record = plan.folder.islands / f"{kind}.json"
    pictures = [
        path for end in FIGURE_FORMATS for path in plan.folder.islands.glob(f"{kind}*.{end}")
    ]
    for number, (images, shown, names, masks) in enumerate(pages, 1):
        if number == 1:  # there is one
            made = make_room([record, *pictures], plan.folder.path, settings, plan.start)
        name = kind if number == 1 else f"{kind}_{number}"
        title = f"Islands of agreement, {settings.exp_name}\n{subject}"
        with torch.no_grad():
            states = model.states(normalize(images, *registry.normalization_of(settings))).float()
        figures = drawn.figures(shown, names, states, title, masks)
        paths = []
        for end, figure in zip(ENDS, figures, strict=True):
            paths += drawn.write(name + end, figure, settings.figure_kinds, settings.figure_dpi)
        say("Written: " + ", ".join(map(str, paths)))
    write_json(record, {"checkpoint": plan.start.name} | made)
    score_folder(plan, model)


def _own(settings):
    """Pages of the user's images: images (B, C, H, W) for the network, the same for people, names,
    and true segments, None if masks do not lie beside the images."""
    for images, paths in pages_of_files(settings, ROWS):
        names = [Path(path).name for path in paths]
        yield images, photographs(paths, settings), names, masks_of(paths, settings)


def _of_test(data, numbers=None):
    """Pages of test images, like those of `_own`, with their true segments where they are known.

    Args:
        data: of the run.
        numbers: of the images in the test set. None for the first of some classes.
    """
    data.check_test()
    dataset, whole = data.test.dataset, data.whole("test")
    if numbers is None:
        rows = sample_rows(data.test, len(data.classes))
    else:
        rows = torch.as_tensor(list(whole.indices))[_within(numbers, len(whole), data.settings)]
    known = [name for name in MASKS if name in getattr(dataset, "extra", {})]
    for page in rows.split(ROWS):
        images, page = numbered(dataset)[page]
        images, names = data.crop(images), [data.classes[label] for label in dataset.labels[page]]
        if numbers is not None:
            names = [f"{row} {name}" for row, name in zip(page.tolist(), names, strict=True)]
        if dataset.paths is None:
            shown = images
        else:
            shown = photographs(dataset.paths[page.numpy()], data.settings, data.entry.margin)
        masks = {name: np.asarray(dataset.extra[name])[page.numpy()] for name in known}
        yield images, shown, names, masks


def _numbers(images):
    """The numbers that --images names, as "3,10-12", as ranges; None if it names none, or a
    file."""
    ranges = r"\d{1,9}(-\d{1,9})?"
    if not re.fullmatch(f"{ranges}(,{ranges})*", images or "") or Path(images).exists():
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

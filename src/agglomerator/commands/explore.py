"""`--mode=explore`: point at a column of an image, and see what agrees with it."""

import os
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only

from agglomerator.commands.build import build_data, build_network
from agglomerator.commands.islands import (
    numbers_in,
    page_of_files,
    page_of_test,
    rows_of,
    states_of_images,
)
from agglomerator.commands.report import tell_blindness
from agglomerator.data import registry
from agglomerator.data.sets.folder import files_of_images
from agglomerator.islands import window
from agglomerator.islands.album import Album
from agglomerator.islands.explorer import Explorer
from agglomerator.plan import resolve
from agglomerator.runs.resume import SIGNALS
from agglomerator.util.errors import UserError
from agglomerator.util.figure import Figure
from agglomerator.util.terminal import say

PAGE = "webagg"
DESKTOPS = "macosx", "qtagg", "gtk4agg", "gtk3agg", "tkagg", "wxagg"  # as matplotlib tries them
KEPT = 16  # images whose states are kept
SAMPLES = 12  # images that decide the colours


@rank_zero_only
def explore(settings, given):
    """Show in a window or on a page what a column of an image agrees with, until the user ends
    it."""
    plan = resolve(settings, given, "islands")
    settings, model = plan.settings, build_network(plan)
    backend = open_backend(os.environ.get(window.BACKEND, ""))
    tell_blindness(settings)
    album = Album(plan.folder.islands, **settings.found_by, projection=plan.folder.projection)
    gallery, output = Gallery(plan, model, album), sys.stdout

    def save(islands, column, t):
        title = f"Islands of agreement, {settings.exp_name}"
        figure = islands.draw_agreement(0, column, t, title)
        try:
            name = free_name(plan.folder.islands)
            paths = album.write(name, figure, settings.figure_kinds, settings.figure_dpi)
        except OSError as error:
            text = f"not written: {error.filename}: {error.strerror}"
        else:
            text = "Written: " + ", ".join(map(str, paths))
        say(text, output)  # the page redirects it
        return text

    show(gallery, save, backend)


def show(gallery, save, backend):
    """Show an `Explorer` until the user closes its window, or ends its page by Ctrl-C."""
    from matplotlib import pyplot as plt

    is_page = backend == PAGE
    with plt.rc_context({} if is_page else {"toolbar": "None"}):
        figure = plt.figure("Explore", FigureClass=Figure, layout="constrained")
    manager = figure.canvas.manager
    figure.canvas.mpl_disconnect(manager.key_press_handler_id)  # matplotlib's own keys
    explorer = Explorer(figure, gallery, save, None if is_page else plt.close)
    for signum in SIGNALS:  # there is nothing to keep
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if is_page:
        say(f"Explore: {window.address()}; Ctrl-C ends it.")
    else:
        say("Explore: a window is open; q closes it.")
    with suppress(KeyboardInterrupt):
        window.wait()
    return explorer


def open_backend(chosen):
    """Make matplotlib use the backend that the user chose, or else the first that works here: of a
    desktop, then a page.

    Args:
        chosen: a name as in MPLBACKEND; empty for none.

    Returns:
        The name of the backend.

    Raises:
        UserError: the chosen one shows no figures here, or none does.
    """
    from matplotlib import pyplot as plt

    reason = "it only writes files"
    for backend in (chosen,) if chosen else (*DESKTOPS, PAGE):
        try:
            if window.opens_windows(backend.lower()):
                plt.switch_backend(backend)
                return backend.lower()
        except (ImportError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
    named = f"MPLBACKEND={chosen}: " if chosen else ""
    raise UserError(
        f"{named}--mode=explore shows nothing here ({reason}); MPLBACKEND=webagg makes a page, "
        "--mode=islands writes files."
    )


class Gallery:
    """The images to look at, each as `Islands` in the colours of one album: those of --images, or
    the whole test set.

    Args:
        plan: of the run.
        model: its network.
        album: of its pictures. If it has no projection yet, some of the images make one.
    """

    def __init__(self, plan, model, album):
        self.settings, self.model, self.album = plan.settings, model, album
        numbers = numbers_in(self.settings.images)
        if self.settings.images is None or numbers is not None:
            self.data = build_data(plan)
            self.data.check_test()
            self.rows = rows_of(self.data, numbers)
        else:
            self.data = None
            s = self.settings.replace(skip_unreadable=False)
            self.files = files_of_images(s, registry.side_of(s))
            self.rows = self.files.labels
        self.islands = lru_cache(KEPT)(self.islands)
        self._fit()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        """The `Islands` of one image.

        Raises:
            UserError: it cannot be read.
        """
        return self.islands(number)

    def islands(self, number):
        images, shown, names, _ = self._page(number)
        states = states_of_images(self.model, images, self.settings)
        return self.album.islands(shown, names, states, model=self.model)

    def _page(self, number):
        rows = self.rows[number : number + 1]
        if self.data is not None:
            page = page_of_test(self.data, rows)
            if len(page[0]):
                return page
            raise UserError(f"image {int(rows[0])} cannot be read.")
        images, read = self.files.fetch(rows.tolist())
        return page_of_files(
            images, [os.fsdecode(self.files.paths[i]) for i in read], self.settings
        )

    def _fit(self):
        """Fit the projection of the album, if it has none, to some of the images."""
        images = []
        for number in np.unique(
            np.linspace(0, len(self) - 1, SAMPLES).round().astype(int)
        ).tolist():
            with suppress(UserError):
                images.append(self._page(number)[0])
        if images:
            states = states_of_images(self.model, torch.cat(images), self.settings)
            if not self.album.open(states):
                self.album.fit(states[-1])


def free_name(folder):
    """The first of the names explore_1, explore_2, ... that no file in a folder has."""
    taken = {path.stem for path in folder.glob("explore_*")}
    return next(name for i in count(1) if (name := f"explore_{i}") not in taken)

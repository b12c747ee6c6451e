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

from agglomerator.commands.build import build_network
from agglomerator.commands.pages import images_of
from agglomerator.commands.report import tell_blindness
from agglomerator.islands import window
from agglomerator.islands.album import Album
from agglomerator.islands.explorer import Explorer
from agglomerator.plan import resolve
from agglomerator.runs.signals import SIGNALS
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
        self.images = images_of(plan, with_numbers=True)
        self.islands = lru_cache(KEPT)(self.islands)
        self._fit()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        """The `Islands` of one image.

        Raises:
            UserError: it cannot be read.
        """
        return self.islands(number)

    def islands(self, number):
        page, states = self._seen(number)
        return self.album.islands(page.shown, page.names, states, model=self.model)

    def _seen(self, number):
        """The `Page` of one image, and its states."""
        page = self.images[[number]]
        if not len(page.images):
            raise UserError(f"image {number} cannot be read.")
        return page, page.states(self.model, self.settings)

    def _fit(self):
        """Fit the projection of the album, if it has none, to some of the images."""
        numbers, states = np.linspace(0, len(self) - 1, SAMPLES).round().astype(int), []
        for number in np.unique(numbers).tolist():
            with suppress(UserError):
                states.append(self._seen(number)[1])
        if states:
            states = torch.cat(states, 1)
            if not self.album.open(states):
                self.album.fit(states[-1])


def free_name(folder):
    """The first of the names explore_1, explore_2, ... that no file in a folder has."""
    taken = {path.stem for path in folder.glob("explore_*")}
    return next(name for i in count(1) if (name := f"explore_{i}") not in taken)

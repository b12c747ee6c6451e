"""What one column agrees with: its island, its cosines and its attention, level by level."""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from agglomerator.islands.figures import LARGE_PANEL, evenly_spaced, level_name, panels_of
from agglomerator.islands.panels import NARROW, outlines, over_photographs, show_image, show_islands

COSINES, WEIGHTS = "RdBu_r", "magma"  # colour maps
ISLAND, COLUMN = "gold", "lime"  # colours of the lines around the column and its island


def draw_agreement(image, column, colours, labels, cosines, attention, title, note):
    """The agreement of an image's columns with one of them: a column of panels for each level, with
    its islands, its cosines and its attention.

    Args:
        image: (C, H, W) uint8, of any size.
        column: (row, column) on the grid.
        colours: (K, S, S, 3), from `Projection.colours`.
        labels: (K, S, S), from `segment`.
        cosines: (K, S, S), of every column with that one.
        attention: (K, S, S), its attention to every column; each level sums to 1.
        title, note: texts above and below.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np, torch
        >>> maps = np.full((2, 4, 4), 1 / 16)
        >>> arrays = np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), int), maps, maps
        >>> figure = draw_agreement(torch.zeros(3, 8, 8), (1, 2), *arrays, "Title", "Note")
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['input', 'level 0\\n(parts)', 'level 1\\n(whole)']
    """
    panels = AgreementPanels(len(labels), title, note)
    panels.show(image, column, colours, labels, cosines, attention)
    return panels.figure


class AgreementPanels:
    """The panels of `draw_agreement`, which can show one image and column after another.

    Args:
        n_levels: K.
        title, note: texts above and below.
        figure: to fill; None for a new one.

    Attributes:
        figure: the matplotlib figure.
        levels: the levels shown, at most 8 of the K.
        axes: (3, 1 + levels) of it; column 0 has the input and the scales.
    """

    def __init__(self, n_levels, title, note, figure=None):
        self.levels = evenly_spaced(n_levels)
        shape = 3, 1 + len(self.levels)
        self.figure, self.axes, self.width = panels_of(
            *shape, title, note, LARGE_PANEL, figure=figure
        )
        self.axes[0, 0].set_title("input", fontsize=10)
        for ax, level in zip(self.axes[0, 1:], self.levels, strict=True):
            ax.set_title(level_name(level, n_levels), fontsize=10)
        scales = ("cosine with\nthe column", COSINES, -1), ("its attention", WEIGHTS, 0)
        for ax, (text, colours, low) in zip(self.axes[1:, 0], scales, strict=True):
            ax.axis("off")
            ax.text(0.5, 0.6, text, ha="center", fontsize=9, transform=ax.transAxes)
            place = ax.inset_axes((0.1, 0.4, 0.8, 0.08))
            scale = ScalarMappable(Normalize(low, 1), colours)
            self.figure.colorbar(scale, cax=place, orientation="horizontal", ticks=(low, 1))
            place.tick_params(labelsize=8)
            if low == 0:
                place.set_xticks((0, 1), ("0", "greatest"))

    def show(self, image, column, colours, labels, cosines, attention):
        """Show the arguments of `draw_agreement` in place of what was shown."""
        for ax in self.axes.flat:
            for artist in (*ax.images, *ax.collections):
                artist.remove()
        row, place = column
        side = labels.shape[-1]
        show_image(self.axes[0, 0], image, side)
        self._mark(self.axes[0, 0], column)
        ground = image if over_photographs([image], side) else None
        for panels, level in zip(self.axes[:, 1:].T, self.levels, strict=True):
            island = labels[level] == labels[level, row, place]
            show_islands(panels[0], colours[level], labels[level], self.width, ground)
            most = attention[level].max()
            panels[1].imshow(cosines[level], cmap=COSINES, vmin=-1, vmax=1)
            panels[2].imshow(attention[level], cmap=WEIGHTS, vmin=0, vmax=most)
            means = [
                f"{cosines[level][place].mean():.2f}" for place in (island, ~island) if place.any()
            ]
            n_islands = len(np.unique(labels[level]))
            texts = (
                (f"its island: {island.sum()}", f"{n_islands} island{'s' * (n_islands > 1)}"),
                (f"its island: {means[0]}", *(f"others: {mean}" for mean in means[1:])),
                (f"its island: {attention[level][island].sum():.0%}", f"greatest: {most:.1%}"),
            )
            for ax, text in zip(panels, texts, strict=True):
                self._mark(ax, column, island)
                ax.set_xlabel((", " if self.width > NARROW else "\n").join(text), fontsize=8)

    def _mark(self, ax, column, island=None):
        """Lines around the column, and around its island (S, S) bool, if it is given."""
        row, place = column
        corners = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1))) / 2 + (place, row)
        square = np.stack((corners, np.roll(corners, -1, 0)), 1)
        rings = [(square, COLUMN)]
        if island is not None:
            rings.insert(0, (outlines(np.pad(island, 1), 1) - 1, ISLAND))
        lines, widths, colours = [], [], []
        for ring, colour in rings:
            for shade, width in (("black", 2.6), (colour, 1.4)):
                lines += [*ring]
                widths += [width] * len(ring)
                colours += [shade] * len(ring)
        style = {"linewidths": widths, "colors": colours, "capstyle": "projecting"}
        ax.add_collection(LineCollection(lines, **style), autolim=False)

"""Pictures of islands: figures from arrays, and the folder that keeps their one projection."""

import numpy as np
from matplotlib.collections import LineCollection
from PIL import Image

from agglomerator.islands.projection import Projection
from agglomerator.islands.segments import count, segment
from agglomerator.util.files import written_whole
from agglomerator.util.lettering import Figure, as_drawn

MOST_PANELS = 8  # levels or iterations in a row
WIDTH, PANEL = 9.0, 1.2  # inches: greatest width of a figure, greatest side of a panel
DPI = 100


class IslandFigures:
    """Pictures of islands in one folder, all in the colours of one projection, which is kept there.

    Args:
        folder: for the pictures. If it has no projection yet, and none was fitted, the states of
            the first picture make one.
        threshold: least cosine of connected neighbours.
    """

    def __init__(self, folder, threshold):
        self.folder, self.threshold = folder, threshold
        self.path = folder / "projection.npz"
        self.projection = None

    def open(self, states):
        """Use the projection of the folder. Returns whether there is one for such states."""
        self.projection = Projection.load(self.path, *states.shape[-2:])
        return self.projection is not None

    def fit(self, states, keep=True):
        """Fit the projection to states (B, n, K, d); write it to the folder unless `keep` is
        False."""
        self.projection = Projection.fit(states)
        if keep:
            self.projection.save(self.path)

    def figures(self, images, names, states, title):
        """The two figures of some images: `levels` of all images after the last iteration, and
        `iterations` of the first image.

        Args:
            images: (B, C, H, W) uint8.
            names: of the images.
            states: (T + 1, B, n, K, d), on the CPU.
            title: of the figures.
        """
        return (
            self.levels(images, names, states[-1], title),
            self.iterations(images[0], names[0], states[:, 0], title),
        )

    def levels(self, images, names, states, title):
        """Figure of `draw_levels` for images (B, C, H, W) with states (B, n, K, d)."""
        return draw_levels(images, names, *self._islands(states), title, self._note(states))

    def iterations(self, image, name, states, title):
        """Figure of `draw_iterations` for an image (C, H, W) with states (T + 1, n, K, d)."""
        islands = self._islands(states)
        title = f"{title}: {name}, over the iterations"
        return draw_iterations(image, *islands, title, self._note(states))

    def _islands(self, states):
        """Colours (B, K, S, S, 3) and labels (B, K, S, S) of states (B, n, K, d)."""
        if self.projection is None and not self.open(states):
            self.fit(states)
        return self.projection.colours(states), segment(states, self.threshold)

    def _note(self, states):
        """What colours and lines mean in a picture of states (B, n, K, d)."""
        shares = self.projection.explained_variance(states)
        levels = evenly_spaced(len(shares))
        shares = ", ".join(f"{shares[level]:.0%} at level {level}" for level in levels)
        return (
            "Equal vectors of a level have equal colours. Like colours need not mean like vectors: "
            f"colours show three axes, which hold {shares} of the variance.\n"
            f"Lines surround islands: neighbours with a cosine of {self.threshold:g} or more."
        )

    def write(self, name, figure):
        """Write a figure as a PNG file of this name; returns its path."""
        path = self.folder / f"{name}.png"
        with written_whole(path, "wb") as file:
            figure.savefig(file, format="png", dpi=DPI)
        return path


def draw_levels(images, names, colours, labels, title, note):
    """The islands of images: a row for each image, with the input and its levels, lowest first.

    Args:
        images: (B, C, H, W) uint8.
        names: of the rows.
        colours: (B, K, S, S, 3), from `Projection.colours`.
        labels: (B, K, S, S), from `segment`.
        title, note: texts above and below.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np, torch
        >>> image, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 4, 4).long()
        >>> figure = draw_levels(image, ["cat"], np.zeros((1, 2, 4, 4, 3)), labels, "Title", "Note")
        >>> [ax.get_title() for ax in figure.axes]
        ['input', 'level 0\\n(parts)', 'level 1\\n(whole)']
    """
    n_images, n_levels = colours.shape[:2]
    levels = evenly_spaced(n_levels)
    names = [_shorten(as_drawn(name)) for name in names]
    margin = 0.08 * max(map(len, names))
    figure, axes = _panels(n_images, 1 + len(levels), title, note, margin)
    for i, row in enumerate(axes):
        _show_image(row[0], images[i])
        row[0].set_ylabel(names[i], rotation=0, ha="right", va="center", labelpad=6)
        for ax, level in zip(row[1:], levels, strict=True):
            _show_islands(ax, colours[i, level], labels[i, level])
    axes[0, 0].set_title("input", fontsize=10)
    for ax, level in zip(axes[0, 1:], levels, strict=True):
        ax.set_title(_level_name(level, n_levels), fontsize=10)
    return figure


def draw_iterations(image, colours, labels, title, note):
    """How the islands of one image form: a row for each level, lowest first, over the iterations.

    Args:
        image: (C, H, W) uint8.
        colours: (T + 1, K, S, S, 3), from `Projection.colours`.
        labels: (T + 1, K, S, S), from `segment`.
        title, note: texts above and below.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np, torch
        >>> colours, labels = np.zeros((3, 2, 4, 4, 3)), torch.zeros(3, 2, 4, 4).long()
        >>> figure = draw_iterations(torch.zeros(3, 8, 8), colours, labels, "Title", "Note")
        >>> [ax.get_title() for ax in figure.axes[:4]]
        ['input', 't = 0', 't = 1', 't = 2']
    """
    n_states, n_levels = colours.shape[:2]
    times, levels = evenly_spaced(n_states), evenly_spaced(n_levels)
    figure, axes = _panels(len(levels), 1 + len(times), title, note)
    _show_image(axes[0, 0], image)
    axes[0, 0].set_title("input", fontsize=10)
    for ax in axes[1:, 0]:
        ax.set_visible(False)
    for row, level in zip(axes[:, 1:], levels, strict=True):
        row[0].set_ylabel(_level_name(level, n_levels), fontsize=10)
        for ax, t in zip(row, times, strict=True):
            _show_islands(ax, colours[t, level], labels[t, level])
    for ax, t in zip(axes[0, 1:], times, strict=True):
        ax.set_title(f"t = {t}", fontsize=10)
    return figure


def _panels(rows, columns, title, note, margin=0.0):
    """A figure with texts, and its (rows, columns) axes; `margin` inches for the names of rows."""
    panel = min(PANEL, (WIDTH - 1) / columns)
    size = 0.4 + panel * columns + margin, 1.1 + (panel + 0.2) * rows
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=8)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure, axes


def _show_image(ax, image):
    ax.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)


def _show_islands(ax, colours, labels):
    """Show colours (S, S, 3), the outlines of the islands in labels (S, S), and their number."""
    side = len(labels)
    number = int(count(labels)[0])
    labels = labels.numpy()
    ax.imshow(colours, interpolation="nearest")
    rows, columns = (labels[:, 1:] != labels[:, :-1]).nonzero()
    upright = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = (labels[1:] != labels[:-1]).nonzero()
    flat = [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    for width, colour in ((2.4, "white"), (1.0, "black")):
        width *= min(1, 12 / side)
        ax.add_collection(LineCollection(upright + flat, linewidths=width, colors=colour))
    ax.set_xlabel(f"{number} island{'s' if number > 1 else ''}", fontsize=8, labelpad=2)


def _shorten(name):
    return name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}"


def _level_name(level, n_levels):
    return f"level {level}" + {0: "\n(parts)", n_levels - 1: "\n(whole)"}.get(level, "")


def evenly_spaced(n):
    """At most `MOST_PANELS` of the indices 0 to n - 1, evenly spaced, with the first and the last.

    Example:
        >>> evenly_spaced(3), evenly_spaced(15)
        ([0, 1, 2], [0, 2, 4, 6, 8, 10, 12, 14])
    """
    return np.unique(np.linspace(0, n - 1, min(n, MOST_PANELS)).round().astype(int)).tolist()


def animate(pictures, path, seconds=12):
    """Write pictures as one animation (GIF). The last one stays longer.

    Args:
        pictures: paths of PNG files. Those of another size than the last are left out.
        path: of the animation.
        seconds: greatest length of all pictures but the last.
    """
    frames = []
    for picture in pictures:
        with Image.open(picture) as image:
            frames.append(image.convert("RGB"))
    frames = [frame for frame in frames if frame.size == frames[-1].size]
    sample = np.concatenate([np.asarray(frames[i]) for i in evenly_spaced(len(frames))])
    palette = Image.fromarray(sample).quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pause = round(1000 * min(0.5, seconds / len(frames)))
    pauses = [pause] * (len(frames) - 1) + [2000]
    with written_whole(path, "wb") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0
        )

"""Pictures of islands: a level's vectors as colours that compare between pictures."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from PIL import Image

from agglomerator.islands.segments import count, segment
from agglomerator.util.files import written_whole
from agglomerator.util.lettering import Figure, shown

MOST_SHOWN = 8  # levels, or iterations, in a row
WIDTH, PANEL = 9.0, 1.2  # inches, of a figure at most, and of one panel in it
DPI = 100
LEAST_SPREAD = 0.1  # distance of unit vectors below which colours hardly differ
LIGHTNESS, RED_GREEN, BLUE_YELLOW = (28, 92), (-45, 45), (-55, 55)  # of CIELAB


class Projection:
    """A map from the vectors of each level to colours, fitted once and used for all pictures.

    Vectors count by their direction, as in consensus. Along the first principal axis of those that
    it is fitted to they become lighter, along the second bluer to yellower, along the third greener
    to redder: who cannot tell red from green misses the least. Equal vectors have equal colours in
    every image and at any time; different ones can look alike, since three axes do not hold all.
    """

    def __init__(self, mean, axes, half):
        self.mean, self.axes, self.half = mean, axes, half

    @classmethod
    def fit(cls, states):
        """Fit to the states (B, n, K, d) of some images."""
        vectors = F.normalize(states.nan_to_num().double(), dim=-1)
        vectors = vectors.flatten(0, 1).transpose(0, 1)  # (K, B*n, d)
        mean = vectors.mean(1, keepdim=True)
        axes = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[:, :3].mT  # (K, d, 3)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = F.pad(axes * largest.sign(), (0, 3 - axes.shape[2]))
        along = (vectors - mean) @ axes
        half = along.abs().quantile(0.98, dim=1, keepdim=True)
        half = half.maximum(half[..., :1] / 3).clamp(min=LEAST_SPREAD)
        return cls(*(x.numpy() for x in (mean, axes, half)))

    @classmethod
    def load(cls, path, levels, width):
        """The projection kept in a file, or None if there is none, whole, for these levels and
        width."""
        shapes = {"mean": (levels, 1, width), "axes": (levels, width, 3), "half": (levels, 1, 3)}
        arrays = kept_arrays(path, shapes)
        if arrays is None:
            return None
        fits = all(arrays[name].shape == shape for name, shape in shapes.items())
        return cls(**arrays) if fits and all(a.dtype.kind == "f" for a in arrays.values()) else None

    def save(self, path):
        with written_whole(path, "wb") as file:
            np.savez(file, mean=self.mean, axes=self.axes, half=self.half)

    def _along(self, vectors):
        """Unit vectors (..., K, n, d) -> places (..., K, n, 3) on the axes, from -1 to 1."""
        return np.clip((vectors - self.mean) @ self.axes / self.half, -1, 1)

    def held(self, states):
        """The share of the variance of the unit vectors that colours show, of each level.

        Args:
            states: (B, n, K, d).

        Returns:
            (K,), from 0 to 1; 1 where all vectors are equal.
        """
        vectors = F.normalize(states.nan_to_num().double(), dim=-1)
        vectors = vectors.flatten(0, 1).transpose(0, 1).numpy()  # (K, B*n, d)
        variance = [x.var(1).sum(-1) for x in (self._along(vectors) * self.half, vectors)]
        return np.divide(*variance, out=np.ones(len(vectors)), where=variance[1] > 1e-12)

    def colours(self, states):
        """states (..., n, K, d) -> colours (..., K, S, S, 3) of sRGB, from 0 to 1."""
        along = self._along(F.normalize(states.double(), dim=-1).movedim(-2, -3).numpy())
        side = round(along.shape[-2] ** 0.5)
        return to_srgb(along.reshape(*along.shape[:-2], side, side, 3))


def kept_arrays(path, names):
    """Arrays by name of an .npz file, or None if there is none that is whole and has these."""
    try:
        with np.load(path) as kept:
            return {name: kept[name] for name in names}
    except Exception:  # no file, or a damaged one, which raises anything
        return None


def to_srgb(along):
    """Places (..., 3) from -1 to 1 on the axes light, yellow, red of CIELAB -> sRGB."""
    ranges = np.array((LIGHTNESS, BLUE_YELLOW, RED_GREEN))
    light, b, a = np.moveaxis(ranges.mean(1) + along * (np.ptp(ranges, axis=1) / 2), -1, 0)
    middle = (light + 16) / 116
    steps = np.stack((middle + a / 500, middle, middle - b / 200), -1)
    white = 0.9505, 1.0, 1.0891
    xyz = np.where(steps > 6 / 29, steps**3, (steps - 4 / 29) * 3 * (6 / 29) ** 2) * white
    linear = xyz @ np.array(
        ((3.2405, -0.9693, 0.0556), (-1.5371, 1.8760, -0.2040), (-0.4985, 0.0416, 1.0572))
    )
    linear = np.clip(linear, 0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


class IslandFigures:
    """Pictures of islands in one folder, all under the one projection that is kept there.

    Args:
        folder: of the pictures. Where it has no projection yet, the states of the first picture
            make one, unless one was fitted before.
        threshold: least cosine of neighbours of one island.
    """

    def __init__(self, folder, threshold):
        self.folder, self.threshold = folder, threshold
        self.path = folder / "projection.npz"
        self.projection = None

    def open(self, states):
        """Use the projection of the folder; returns whether there is one for such states."""
        self.projection = Projection.load(self.path, *states.shape[-2:])
        return self.projection is not None

    def fit(self, states, keep=True):
        """Fit the projection to states (B, n, K, d), and keep it in the folder."""
        self.projection = Projection.fit(states)
        if keep:
            self.projection.save(self.path)

    def figures(self, images, names, states, title):
        """The two pictures of some images, as functions that draw into a figure.

        Args:
            images: (B, C, H, W) uint8.
            names: of the images.
            states: (T + 1, B, n, K, d), on the CPU.
            title: of the pictures.

        Returns:
            (levels, iterations): of all images after the last iteration; of the first one over all
            iterations. They return the size that suits the figure, in inches.
        """
        if self.projection is None and not self.open(states):
            self.fit(states[-1])
        last, first = (
            {
                "colours": self.projection.colours(of),
                "labels": segment(of, self.threshold),
                "note": self._note(of),
            }
            for of in (states[-1], states[:, 0])
        )
        title_of_one = f"{title}: {names[0]}, over the iterations"
        return (
            partial(draw_levels, images=images, names=names, title=title, **last),
            partial(draw_iterations, image=images[0], title=title_of_one, **first),
        )

    def _note(self, states):
        """What colours and lines mean in a picture of states (B, n, K, d)."""
        held = self.projection.held(states)
        held = ", ".join(f"{held[level]:.0%} at level {level}" for level in chosen(len(held)))
        return (
            "Equal vectors of a level have equal colours. Like colours need not mean like vectors: "
            f"of the variance here the three axes of colour hold {held}.\n"
            f"Lines surround islands: neighbours of cosine {self.threshold:g} or more."
        )

    def write(self, name, sheet):
        """Write one of what `figures` returned as a PNG file; returns its path."""
        path = self.folder / f"{name}.png"
        figure = Figure(layout="constrained")
        figure.set_size_inches(*sheet(figure))
        with written_whole(path, "wb") as file:
            figure.savefig(file, format="png", dpi=DPI)
        return path


def draw_levels(figure, images, names, colours, labels, title, note):
    """Draw a row for each image: the input, then its levels from lowest to highest.

    Args:
        figure: matplotlib figure; what it showed before is removed.
        images: (B, C, H, W) uint8.
        names: of the rows.
        colours: (B, K, S, S, 3), from `Projection.colours`.
        labels: (B, K, S, S), of the islands.
        title, note: above and below.

    Returns:
        The size that suits it, in inches.
    """
    n_images, n_levels = colours.shape[:2]
    levels = chosen(n_levels)
    axes, (width, height) = begin(figure, n_images, 1 + len(levels), title, note)
    names = [short(shown(name)) for name in names]
    for i, row in enumerate(axes):
        show_image(row[0], images[i])
        row[0].set_ylabel(names[i], rotation=0, ha="right", va="center", labelpad=6)
        for ax, level in zip(row[1:], levels, strict=True):
            show_islands(ax, colours[i, level], labels[i, level])
    axes[0, 0].set_title("input", fontsize=10)
    for ax, level in zip(axes[0, 1:], levels, strict=True):
        ax.set_title(name_of(level, n_levels), fontsize=10)
    return width + 0.08 * max(map(len, names)), height


def draw_iterations(figure, image, colours, labels, title, note):
    """Draw how the islands of one image form: a row for each level, lowest first, over iterations.

    Args:
        figure: matplotlib figure; what it showed before is removed.
        image: (C, H, W) uint8.
        colours: (T + 1, K, S, S, 3), from `Projection.colours`.
        labels: (T + 1, K, S, S), of the islands.
        title, note: above and below.

    Returns:
        The size that suits it, in inches.
    """
    n_states, n_levels = colours.shape[:2]
    times, levels = chosen(n_states), chosen(n_levels)
    axes, size = begin(figure, len(levels), 1 + len(times), title, note)
    show_image(axes[0, 0], image)
    axes[0, 0].set_title("input", fontsize=10)
    for ax in axes[1:, 0]:
        ax.set_visible(False)
    for row, level in zip(axes[:, 1:], levels, strict=True):
        row[0].set_ylabel(name_of(level, n_levels), fontsize=10)
        for ax, t in zip(row, times, strict=True):
            show_islands(ax, colours[t, level], labels[t, level])
    for ax, t in zip(axes[0, 1:], times, strict=True):
        ax.set_title(f"t = {t}", fontsize=10)
    return size


def begin(figure, rows, columns, title, note):
    """Empty a figure, give it texts; returns its (rows, columns) axes and the size it needs."""
    figure.clear()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=8)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    panel = min(PANEL, (WIDTH - 1) / columns)
    return axes, (0.4 + panel * columns, 1.1 + (panel + 0.2) * rows)


def show_image(ax, image):
    ax.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)


def show_islands(ax, colours, labels):
    """Show colours (S, S, 3) with the outlines of islands (S, S) and their number under it."""
    side = len(labels)
    labels = labels.numpy()
    ax.imshow(colours, interpolation="nearest")
    rows, columns = (labels[:, 1:] != labels[:, :-1]).nonzero()
    upright = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = (labels[1:] != labels[:-1]).nonzero()
    level = [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    for width, colour in ((2.4, "white"), (1.0, "black")):
        thin = min(1, 12 / side)
        ax.add_collection(LineCollection(upright + level, linewidths=width * thin, colors=colour))
    number = int(count(torch.from_numpy(labels))[0])
    ax.set_xlabel(f"{number} island{'s' if number > 1 else ''}", fontsize=8, labelpad=2)


def short(name):
    return name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}"


def name_of(level, n_levels):
    return f"level {level}" + {0: "\n(parts)", n_levels - 1: "\n(whole)"}.get(level, "")


def chosen(n):
    """Which of n to show: the first, the last, and some in between."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_SHOWN)).round().astype(int)).tolist()


def animate(pictures, path, seconds=12):
    """Write pictures, paths of PNG files, as one animation (GIF); the last one stays longer."""
    frames = []
    for picture in pictures:
        with Image.open(picture) as image:
            frames.append(image.convert("RGB"))
    frames = [frame for frame in frames if frame.size == frames[-1].size]
    some = np.concatenate([np.asarray(frames[i]) for i in chosen(len(frames))])
    palette = Image.fromarray(some).quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pause = round(1000 * min(0.5, seconds / len(frames)))
    pauses = [pause] * (len(frames) - 1) + [2000]
    with written_whole(path, "wb") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0
        )

"""Pictures of islands: figures from arrays."""

import math

import numpy as np
from PIL import Image

from agglomerator.islands.panels import (
    NARROW,
    NOT_SCORED,
    least_outlined,
    over_photographs,
    show_image,
    show_islands,
    show_mask,
    show_outlines,
)
from agglomerator.util.figure import Figure, as_drawn
from agglomerator.util.files import written_whole

MOST_PANELS = 8  # levels or iterations in a row
WIDTH = 9.0  # inches: greatest width of a figure
PANEL, LARGE_PANEL = 1.2, 1.9  # inches: greatest side of a panel of cells, of a photograph
LETTERS = 14  # of a note, an inch


def caption(images, states, projection, threshold, loss=None):
    """What colours and lines mean in a picture.

    Args:
        images: a sequence of (C, H, W).
        states: (B, n, K, d), all that the picture shows.
        projection: that of its colours.
        threshold, loss: as for `segment`.
    """
    shares = projection.explained_variance(states)
    levels = evenly_spaced(len(shares))
    shares = ", ".join(f"{shares[level]:.0%} at level {level}" for level in levels)
    side = math.isqrt(states.shape[1])
    if over_photographs(images, side):
        colours = "Tint: mean colour of an island; equal vectors of a level have equal colours."
    else:
        colours = "Equal vectors of a level have equal colours."
    return (
        f"{colours} Like colours need not mean like vectors: colours show three axes, which "
        f"hold {shares} of the variance.\n{caption_of_lines(side, threshold, loss)}"
    )


def caption_of_lines(side, threshold, loss=None, single=True):
    """What lines mean in a picture of islands on a grid of `side` columns a side; and, with
    `single`, what that word below a panel means."""
    islands = rule_of_islands(threshold, loss) + "; single: of one column" * single
    return f"Islands: {islands}. Lines surround those of {least_outlined(side)} columns or more."


def rule_of_islands(threshold, loss=None):
    """In words, which columns are an island; the arguments are those of `segment`."""
    if loss is None:
        return f"neighbours with a cosine of {threshold:g} or more"
    return (
        f"neighbours merged at a cost of at most {loss:g} (--island_loss), on each lower level a "
        "quarter of that"
    )


def caption_of_masks(masks):
    """What true segments look like in a picture; masks as for `draw_levels`."""
    unscored = any((np.asarray(mask) == NOT_SCORED).any() for mask in masks.values())
    dark = " dark: not scored;" if unscored else ""
    return f"True segments are tinted;{dark} background has no tint."


def draw_levels(images, names, colours, labels, title, note, masks=None):
    """The islands of images: a row for each image, with the input and its levels, lowest first, and
    its true segments where they are known.

    Islands are drawn over the image where it is large enough, as `over_photographs` tells, or else
    as coloured cells.

    Args:
        images: (B, C, H, W) uint8, or a list of B images (C, H, W) of any size.
        names: of the rows.
        colours: (B, K, S, S, 3), from `Projection.colours`.
        labels: (B, K, S, S), from `segment`.
        title, note: texts above and below.
        masks: true segments, (B, H, W) integers by name, such as "parts": 0 background, 255 not
            scored. None if they are not known.

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
    levels, masks = evenly_spaced(n_levels), masks or {}
    large = over_photographs(images, labels.shape[-1])
    names = [_shorten(as_drawn(name)) for name in names]
    margin = 0.2 if large else 0.08 * max(map(len, names))
    most = LARGE_PANEL if large else PANEL
    panels = 1 + len(levels) + len(masks)
    figure, axes, width = panels_of(n_images, panels, title, note, most, margin)
    placing = {"va": "center", "labelpad": 6} | ({} if large else {"rotation": 0, "ha": "right"})
    for i, row in enumerate(axes):
        show_image(row[0], images[i])
        row[0].set_ylabel(names[i], **placing)
        for ax, level in zip(row[1:], levels, strict=False):
            ground = images[i] if large else None
            show_islands(ax, colours[i, level], labels[i, level], width, ground)
        for ax, mask in zip(row[1 + len(levels) :], masks.values(), strict=True):
            show_mask(ax, mask[i], width, images[i])
    titles = ["input", *(level_name(level, n_levels) for level in levels)]
    for ax, text in zip(axes[0], [*titles, *(f"true {name}" for name in masks)], strict=True):
        ax.set_title(text, fontsize=10)
    return figure


def draw_iterations(image, colours, labels, title, note):
    """How the islands of one image form: a row for each level, lowest first, over the iterations.

    Args:
        image: (C, H, W) uint8, of any size.
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
    large = over_photographs([image], labels.shape[-1])
    most = LARGE_PANEL if large else PANEL
    figure, axes, width = panels_of(len(levels), 1 + len(times), title, note, most)
    show_image(axes[0, 0], image)
    axes[0, 0].set_title("input", fontsize=10)
    for ax in axes[1:, 0]:
        ax.set_visible(False)
    for row, level in zip(axes[:, 1:], levels, strict=True):
        row[0].set_ylabel(level_name(level, n_levels), fontsize=10)
        for ax, t in zip(row, times, strict=True):
            ground = image if large else None
            show_islands(ax, colours[t, level], labels[t, level], width, ground)
    for ax, t in zip(axes[0, 1:], times, strict=True):
        ax.set_title(f"t = {t}", fontsize=10)
    return figure


def draw_grid(images, names, labels, title, note):
    """The borders of the islands of one level over each of any number of images, in a grid.

    Args:
        images: (B, C, H, W) uint8, or a list of B images (C, H, W) of any size.
        names: of the images.
        labels: (B, S, S), from `segment`.
        title, note: texts above and below.

    Returns:
        A matplotlib figure.

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(3, 3, 8, 8), torch.zeros(3, 4, 4).long()
        >>> figure = draw_grid(images, ["cat", "dog", "cow"], labels, "Title", "Note")
        >>> [ax.get_title() for ax in figure.axes if ax.get_visible()]
        ['cat', 'dog', 'cow']
    """
    n_images = len(images)
    columns = min(MOST_PANELS, max(3, math.ceil(n_images**0.5)), n_images)
    most = LARGE_PANEL if over_photographs(images, labels.shape[-1]) else PANEL
    figure, axes, width = panels_of(-(-n_images // columns), columns, title, note, most, titles=0.2)
    for i, ax in enumerate(axes.flat):
        if i < n_images:
            show_outlines(ax, images[i], labels[i], width)
            ax.set_title(_shorten(as_drawn(names[i])), fontsize=8, pad=3)
        else:
            ax.set_visible(False)
    return figure


def panels_of(rows, columns, title, note, most, margin=0.0, titles=0.0, figure=None):
    """A figure with texts, its (rows, columns) axes, and their width: at most `most` inches.

    Args:
        margin: inches for the names of rows.
        titles: inches for what stands above each panel.
        figure: to fill; None for a new one.
    """
    panel = min(most, (WIDTH - 1) / columns)
    below = titles + (0.2 if panel > NARROW else 0.32)
    width = 0.4 + panel * columns + margin
    lines = sum(math.ceil(len(line) / (LETTERS * width)) for line in note.split("\n"))
    height = 0.9 + 0.14 * lines + (panel + below) * rows
    figure = Figure(layout="constrained") if figure is None else figure
    figure.set_size_inches(width, height)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=8)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure, axes, panel


def _shorten(name):
    return name if len(name) <= 16 else f"{name[:9]}…{name[-6:]}"


def level_name(level, n_levels):
    return f"level {level}" + {0: "\n(parts)", n_levels - 1: "\n(whole)"}.get(level, "")


def evenly_spaced(n):
    """At most `MOST_PANELS` of the indices 0 to n - 1, evenly spaced, with the first and the last.

    Example:
        >>> evenly_spaced(3), evenly_spaced(15)
        ([0, 1, 2], [0, 2, 4, 6, 8, 10, 12, 14])
    """
    return np.unique(np.linspace(0, n - 1, min(n, MOST_PANELS)).round().astype(int)).tolist()


def animate(pictures, path, seconds=12, longest=0.5):
    """Write pictures as one animation (GIF). The last one stays longer.

    Args:
        pictures: paths of PNG files. Those of another size than the last are left out.
        path: of the animation.
        seconds: greatest length of all pictures but the last.
        longest: greatest length of one of them, in seconds.
    """
    frames = []
    for picture in pictures:
        with Image.open(picture) as image:
            frames.append(image.convert("RGB"))
    frames = [frame for frame in frames if frame.size == frames[-1].size]
    sample = np.concatenate([np.asarray(frames[i]) for i in evenly_spaced(len(frames))])
    palette = Image.fromarray(sample).quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pause = round(1000 * min(longest, seconds / len(frames)))
    pauses = [pause] * (len(frames) - 1) + [2000]
    with written_whole(path, "wb") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0
        )

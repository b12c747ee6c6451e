"""One panel of a picture: an image, its islands, or its true segments, on matplotlib axes.

Islands are shown over the photograph where a reader can see them there, and as coloured cells where
the image is small or has few columns (`over_photographs`).
"""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from scipy.ndimage import label

PHOTOGRAPH, COLUMNS = 64, 8  # least sides, in pixels and in columns, to show islands over an image
FINE = 256  # least pixels a side of a tinted image: the borders of its tints stay sharp
NARROW = 1.4  # inches: the text below a panel that is no wider has two lines
TINT = 0.55  # share of the tint in what is drawn over a photograph
SATURATION, LIGHT = 0.3, (0.15, 0.95)  # of the photograph below: what is left of its colours, range
GRAY = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601
NOT_SCORED, DARK = 255, 0.2  # a value of masks, and its gray
GRAY_OF_PALETTE = 7  # a colour of segments that would be taken for no tint


def over_photographs(images, side):
    """Whether islands of `side` columns a side are to be drawn over these images.

    Args:
        images: a sequence of (C, H, W).
        side: S.
    """
    return side >= COLUMNS and max(min(image.shape[1:]) for image in images) >= PHOTOGRAPH


def least_outlined(side):
    """Size of the smallest segments that get an outline on a grid of `side` cells a side. Lines
    around smaller ones would hide the picture.

    Example:
        >>> least_outlined(8), least_outlined(32), least_outlined(64)
        (2, 4, 8)
    """
    return max(2, side // 8)


def sizes(labels):
    """The size of the segment of every cell: labels (S, S) -> (S, S)."""
    _, segment, size = np.unique(labels, return_inverse=True, return_counts=True)
    return size[segment].reshape(labels.shape)


def means(colours, labels):
    """Give every cell the mean colour of its segment: colours (S, S, 3), labels (S, S) ->
    (S, S, 3).

    Example:
        >>> import numpy as np
        >>> colours = np.array([[[0.0, 0, 0], [1, 1, 1]]])
        >>> means(colours, np.array([[7, 7]])).tolist()
        [[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]]
    """
    _, segment, size = np.unique(labels, return_inverse=True, return_counts=True)
    segment = segment.ravel()
    sums = [np.bincount(segment, channel.ravel()) for channel in np.moveaxis(colours, -1, 0)]
    return (np.stack(sums, -1) / size[:, None])[segment].reshape(colours.shape)


def outlines(labels, least):
    """The borders of segments, as straight lines.

    Segments of fewer than `least` cells have no outline of their own. On a fine grid, where `least`
    is more than 2, the lines of their neighbours leave them out too, unless several lie side by
    side and make up `least` cells.

    Args:
        labels: (S, S) integers.
        least: size of the smallest segments with an outline.

    Returns:
        (E, 2, 2): both ends (x, y) of each line; cell (0, 0) lies around the point (0, 0).

    Example:
        >>> import numpy as np
        >>> outlines(np.array([[1, 1], [2, 2]]), 2).tolist()
        [[[-0.5, 0.5], [1.5, 0.5]]]
        >>> len(outlines(np.array([[1, 2], [3, 4]]), 2))
        0
    """
    labels = labels.astype(np.int64)
    small = sizes(labels) < least
    patches, _ = label(small)
    specks = small & (np.bincount(patches.ravel())[patches] < least) & (least > 2)
    regions = np.where(small, labels.min() - 1, labels)

    def borders(regions, specks):
        """Lines below cells: first and last of a row's neighbours on a border, and the row."""
        border = (regions[1:] != regions[:-1]) & ~specks[1:] & ~specks[:-1]
        steps = np.diff(np.pad(border, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        rows, starts = (steps == 1).nonzero()
        ends = (steps == -1).nonzero()[1]
        lines = np.stack((np.stack((starts, rows + 1), -1), np.stack((ends, rows + 1), -1)), 1)
        return lines - 0.5

    flat, upright = borders(regions, specks), borders(regions.T, specks.T)
    return np.concatenate((flat, upright[..., ::-1]))


def show_image(ax, image, side=None):
    """Show an image (C, H, W) uint8, C = 1 or 3; with `side`, on the axes of a grid of so many
    columns a side."""
    edge = None if side is None else (-0.5, side - 0.5, side - 0.5, -0.5)
    kind = _interpolation(image)
    pixels = _pixels(image).numpy()
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=kind, extent=edge)


def show_islands(ax, colours, labels, width, image=None):
    """Show islands: coloured cells, or over an image each in its mean colour, with outlines, and
    their number below.

    Args:
        ax: matplotlib axes.
        colours: (S, S, 3), from `Projection.colours`.
        labels: (S, S), from `segment`.
        width: of the panel, in inches.
        image: (C, H, W) uint8, or None for coloured cells.
    """
    labels = np.asarray(labels)
    over = image is not None
    shown = _tinted(image, means(colours, labels), TINT) if over else colours
    _show_cells(ax, shown, labels, width)
    _tell_number(ax, labels, width)


def show_outlines(ax, image, labels, width):
    """Show an image as it is, the outlines of its islands, and their number below.

    Args:
        ax: matplotlib axes.
        image: (C, H, W) uint8.
        labels: (S, S), from `segment`.
        width: of the panel, in inches.
    """
    labels = np.asarray(labels)
    pixels = _pixels(image).numpy()
    colours = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1)
    _show_cells(ax, colours, labels, width, _interpolation(image))
    _tell_number(ax, labels, width)


def _tell_number(ax, labels, width):
    number, single = len(np.unique(labels)), int((sizes(labels) == 1).sum())
    text = f"{number} island{'s' if number > 1 else ''}"
    text += f"{' ' if width > NARROW else chr(10)}({single} single)" if single else ""
    ax.set_xlabel(text, fontsize=8, labelpad=2)


def show_mask(ax, mask, width, image):
    """Show true segments over an image, in different tints; background has none, and what is not
    scored is dark. Nothing is shown if there is no segment.

    Args:
        ax: matplotlib axes.
        mask: (H, W) integers: 0 background, 255 not scored, others segments.
        width: of the panel, in inches.
        image: (C, H', W') uint8.
    """
    mask = np.asarray(mask)
    palette = np.delete(matplotlib.color_sequences["tab10"], GRAY_OF_PALETTE, 0)
    segments = np.setdiff1d(mask, (0, NOT_SCORED))
    if not len(segments):
        ax.axis("off")
        return
    colours = palette[np.searchsorted(segments, mask) % len(palette)]
    colours[mask == NOT_SCORED] = DARK
    _show_cells(ax, _tinted(image, colours, TINT * (mask > 0)), mask, width)
    number = len(segments)
    ax.set_xlabel(f"{number} segment{'s' if number > 1 else ''}", fontsize=8, labelpad=2)


def _show_cells(ax, picture, labels, width, kind=None):
    """Show a picture (N, N, 3) and the outlines of the segments in labels (S, S), white between
    black, which are seen on any ground."""
    side = len(labels)
    edge = -0.5, side - 0.5
    kind = kind or ("nearest" if len(picture) == side else "antialiased")
    ax.imshow(picture, interpolation=kind, extent=(*edge, *edge[::-1]))
    lines = outlines(labels, least_outlined(side))
    core = np.clip(0.16 * 72 * width / side, 0.4, 0.8)
    for factor, colour in ((2.2, "black"), (1, "white")):
        style = {"linewidths": factor * core, "colors": colour, "capstyle": "projecting"}
        ax.add_collection(LineCollection(lines, **style))


def _interpolation(image):
    return "antialiased" if min(image.shape[1:]) >= PHOTOGRAPH else "nearest"


def _pixels(image):
    """(C, H, W) uint8 -> (H, W, C) from 0 to 1; (H, W) of one channel."""
    return torch.as_tensor(image).movedim(0, -1).squeeze(-1).float() / 255


def _tinted(image, colours, share):
    """An image (C, H, W) uint8, paler, under colours (S, S, 3) of which `share` covers it, a number
    or (S, S) -> (N, N, 3)."""
    tint = _enlarged(colours, image.shape[1])
    share = _enlarged(np.broadcast_to(share, colours.shape[:2])[..., None], image.shape[1])
    scaled = F.interpolate(
        torch.as_tensor(image)[None].float() / 255, tint.shape[:2], mode="bilinear", antialias=True
    )
    pixels = scaled[0].movedim(0, -1).numpy()
    gray = (pixels @ GRAY)[..., None] if pixels.shape[-1] == 3 else pixels
    low, high = LIGHT
    pale = low + (high - low) * (gray + SATURATION * (pixels - gray))
    return np.clip((1 - share) * pale + share * tint, 0, 1)


def _enlarged(cells, pixels):
    """Repeat cells (S, S, ...) to at least `FINE` and at least `pixels` a side, each as often."""
    times = -(-max(FINE, pixels) // len(cells))
    return cells.repeat(times, 0).repeat(times, 1)

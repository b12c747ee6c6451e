"""Pictures of masked pre-training: images, their hidden patches, and what the network predicts."""

import numpy as np

from agglomerator.islands.panels import show_image
from agglomerator.util.figure import Figure, as_drawn

PANEL = 1.5  # inches, of a panel
GRAY = 128  # of hidden patches
TITLES = "input", "seen", "predicted", "all predicted"
NOTE = (
    "Gray patches are hidden from the network. Predicted: seen patches, and what it predicts in "
    "place of hidden ones; error: mean squared, of normalised pixels."
)


def draw_reconstructions(images, hidden, predicted, errors, names, title):
    """A row for each image: the input, what the network sees of it, the same with the hidden
    patches predicted, and the whole prediction.

    Args:
        images: (B, C, H, W) uint8.
        hidden: (B, H, W) bool.
        predicted: (B, C, H, W) uint8.
        errors: (B,), mean squared error of hidden pixels.
        names: of the rows.
        title: of the figure.

    Returns:
        A matplotlib figure.

    Example:
        >>> image, hidden = np.zeros((1, 3, 8, 8), np.uint8), np.eye(8, dtype=bool)[None]
        >>> figure = draw_reconstructions(image, hidden, image + 9, [0.5], ["cat"], "Title")
        >>> [ax.get_title() for ax in figure.axes]
        ['input', 'seen', 'predicted', 'all predicted']
    """
    images, hidden, predicted = (np.asarray(each) for each in (images, hidden, predicted))
    shown = hidden[:, None]
    seen, filled = np.where(shown, np.uint8(GRAY), images), np.where(shown, predicted, images)
    size = 0.5 + PANEL * len(TITLES), 0.9 + (PANEL + 0.2) * len(images)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(NOTE, fontsize=8)
    axes = figure.subplots(len(images), len(TITLES), squeeze=False)
    for i, row in enumerate(axes):
        for ax, panel in zip(row, (images, seen, filled, predicted), strict=True):
            ax.set(xticks=[], yticks=[])
            show_image(ax, panel[i])
        row[0].set_ylabel(as_drawn(names[i])[:16], fontsize=9)
        row[2].set_xlabel(f"error {float(errors[i]):.3f}", fontsize=8, labelpad=2)
    for ax, text in zip(axes[0], TITLES, strict=True):
        ax.set_title(text, fontsize=10)
    return figure

"""The losses of masked pre-training, over all processes as if they were one batch."""

import torch
import torch.nn.functional as F

from agglomerator.util.distributed import gather
from agglomerator.util.precision import upcast


def hidden_pixel_loss(predicted, images, hidden):
    """Mean squared error of the pixels of hidden patches alone.

    Args:
        predicted, images: (B, C, H, W), normalised.
        hidden: (B, H, W) bool; as many are True in each process.

    Returns:
        A scalar of float32, or of float64 if the images are.

    Example:
        >>> images, hidden = torch.ones(1, 1, 4, 8), torch.tensor([[[True] * 4 + [False] * 4] * 4])
        >>> hidden_pixel_loss(3 * images, images, hidden).item()
        4.0
    """
    squares = (upcast(predicted) - images).square() * hidden[:, None]
    return squares.sum() / (hidden.sum() * images.shape[1])


def level_cosine_loss(model, states, across_processes=True):
    """Tell how far what the column nets say is from the levels that hear it (Agglomerator++, the
    terms beside the loss of pixels).

    At every iteration it adds one minus the mean cosine of BU(L_K-2), what the top level receives
    from below, with the top level; and one minus that of TD(L_k+1) with L_k, the mean over levels
    k. Both sides are of the state before the iteration. The mean is over all pairs of a column of
    an image with one of the same or another image, in all processes.

    Args:
        model: the `Agglomerator`.
        states: T + 1 `State`s, from `Agglomerator.reconstruct`.
        across_processes: False to compare the columns of this process alone.

    Returns:
        A scalar, the mean over the T iterations, from 0 to 4.
    """
    terms = []
    for t, state in enumerate(states[:-1]):
        levels = [level for _, block in state.blocks for level in block]
        # Columns of the initial state are equal, and their norm passes only rounding noise on.
        sources = [level.detach() if t == 0 else level for level in levels]
        top = len(levels) - 1
        said = model.bottom_up.plain(sources[top - 1], top)
        terms.append(1 - _mean_cosine(said, levels[top], across_processes))
        said = [model.top_down.plain(sources[k + 1], k) for k in range(top)]
        cosines = [
            _mean_cosine(*pair, across_processes) for pair in zip(said, levels, strict=False)
        ]
        terms.append(1 - torch.stack(cosines).mean())
    return torch.stack(terms).sum() / (len(states) - 1)


def _mean_cosine(one, other, across):
    """Mean cosine over all pairs of a column of one and of the other, each (d, B, n): the product
    of the mean unit vectors."""
    means = [F.normalize(upcast(x), dim=0).flatten(1).mean(1) for x in (one, other)]
    one, other = (gather(mean[None]).mean(0) for mean in means) if across else means
    return (one * other).sum()

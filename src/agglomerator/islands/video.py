"""Islands of clips: the state carried from frame to frame, or each frame anew.

GLOM carries its state from one frame of a video to the next (Hinton 2021, arXiv 2102.12627,
section 1): what was agreed upon in the last frame is what the next one begins with.
"""

import numpy as np
import torch

from agglomerator.islands.baselines import most_common
from agglomerator.islands.figures import draw_levels
from agglomerator.islands.projection import to_srgb
from agglomerator.islands.scores import against_mask
from agglomerator.islands.segments import segment
from agglomerator.islands.tracks import follow, over_time, summary
from agglomerator.util.errors import UserError

GOLDEN = (5**0.5 - 1) / 2  # of a turn: the hues of numbers that follow one another lie far apart
CHROMA, LIGHTNESS = 0.85, (-0.25, 0.2, 0.6)  # on the axes of `to_srgb`
PAIRS = {"parts": 0, "objects": -1}  # kind of mask -> the level whose islands are to fit it


def watch(model, frames, carry=True, threshold=0.8, loss=None):
    """The islands of clips, followed from frame to frame.

    Args:
        model: `Agglomerator` in evaluation mode, which makes `iters` iterations for each frame.
        frames: F views (B, C, S, S) of B clips, on the model's device.
        carry: each frame begins with the state that the last one ended with; else with the initial
            one. Either way islands are followed by their overlap.
        threshold, loss: as for `segment`.

    Returns:
        (names, labels): (B, K, F, S, S) int64, from `follow`, and the islands of each frame for
        itself.

    Raises:
        UserError: a state is not finite.
    """
    state, labels = None, []
    for number, views in enumerate(frames):
        with torch.no_grad():
            last = model.states(views, levels=state)[-1]
        if not last.isfinite().all():
            raise UserError(
                f"--video: the states are not finite from frame {number} on, and make no islands; "
                "try fewer --iters."
            )
        state = last if carry else None
        labels.append(segment(last.float().cpu(), threshold, loss))
    labels = torch.stack(labels, 2)  # (B, K, F, S, S)
    names = [torch.stack([follow(level) for level in picture]) for picture in labels]
    return torch.stack(names), labels


def rows_of(names, of):
    """How islands live, level by level.

    Args:
        names: (B, K, F, S, S), from `watch`.
        of: what they are of, for the names of rows.

    Returns:
        A list of K dictionaries: `of`, and means over B of `summary`.
    """
    rows = []
    for level, pictures in enumerate(names.unbind(1)):
        found = [summary(picture) for picture in pictures]
        means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
        rows.append({"of": f"level {level}, {of}"} | means)
    return rows


def score(names, labels, masks):
    """How well followed islands fit true segments, those of parts at the lowest level and those of
    objects at the highest.

    Args:
        names, labels: (B, K, F, S, S), from `watch`.
        masks: (B, F, H, W) by kind, "parts" and "objects", whose segments keep their numbers.

    Returns:
        A list of K dictionaries with `<kind>_ari` and `<kind>_iou` over space and time
        (`over_time`) and `<kind>_ari_of_frames`, mean over frames, each for itself. Without those
        that no picture has.
    """
    rows = [{} for _ in range(names.shape[1])]
    for kind, level in PAIRS.items():
        fit = fit_of(names[:, level], labels[:, level], masks[kind])
        rows[level] |= {f"{kind}_{key}": value for key, value in fit.items()}
    return rows


def fit_of(names, labels, mask):
    """`ari`, `iou` and `ari_of_frames` of names and labels (B, F, S, S) against masks (B, F, H, W),
    means over those pictures that have them."""
    ari, iou = over_time(names, mask)
    of_frames = against_mask(labels.flatten(0, 1), mask.flatten(0, 1))[0]
    scores = {"ari": ari, "iou": iou, "ari_of_frames": of_frames}
    means = {key: float(values.nanmean()) for key, values in scores.items()}
    return {key: value for key, value in means.items() if not np.isnan(value)}


def best_possible(masks, side):
    """What following by overlap reaches with the true segments of each frame, on a grid of `side`
    columns: a row as those of `score`, for all levels."""
    row = {"of": "true masks, on this grid"}
    for kind, mask in masks.items():
        labels = torch.stack([most_common(frames, side) for frames in mask])
        names = torch.stack([follow(picture) for picture in labels])
        row |= {f"{kind}_{key}": value for key, value in fit_of(names, labels, mask).items()}
    return row


def colours_of(names):
    """A colour for every island, which it keeps: names (...,) -> (..., 3) of sRGB, from 0 to 1.

    Example:
        >>> import numpy as np
        >>> colours_of(np.arange(5)).shape
        (5, 3)
    """
    names = np.asarray(names)
    turn = 2 * np.pi * names * GOLDEN
    light = np.array(LIGHTNESS)[names % len(LIGHTNESS)]
    return to_srgb(np.stack((light, CHROMA * np.sin(turn), CHROMA * np.cos(turn)), -1))


def draw_frames(shown, labels, names, title, note, masks=None):
    """Yield a figure for each frame of clips: a row for each picture, with the frame, the
    islands of its levels, and its true segments where they are known.

    Args:
        shown: (B, F, C, H, W) uint8.
        labels: of the rows.
        names: (B, K, F, S, S), from `watch`.
        title, note: texts above, before the number of the frame, and below.
        masks: (B, F, H, W) by kind, or None.
    """
    n_frames = names.shape[2]
    for t in range(n_frames):
        now = names[:, :, t]
        at = {f"{kind}": mask[:, t] for kind, mask in (masks or {}).items()}
        head = f"{title}, frame {t + 1} of {n_frames}"
        yield draw_levels(shown[:, t], labels, colours_of(now), now, head, note, at)

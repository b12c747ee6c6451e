"""Islands from frame to frame: which is which, how long they live, how far they go.

An island of a frame is that island of the frame before with which it overlaps most. All pairs are
chosen together, each island at most once, so that the sum of their overlaps (intersection over
union) is greatest (Kuhn 1955), as trackers of boxes do (SORT, Bewley et al. 2016, arXiv
1602.00763). Where no island overlaps enough, a new one begins.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from agglomerator.islands.scores import against_mask
from agglomerator.islands.segments import to_pixels

LEAST_OVERLAP = 0.1


def follow(labels, least=LEAST_OVERLAP):
    """Give the islands of a clip names that they keep.

    Args:
        labels: (F, S, S) integers, those of each frame for itself, from `segment`.
        least: overlap, intersection over union, below which an island is a new one.

    Returns:
        (F, S, S) int64, numbers from 0 in the order in which islands appear.

    Example:
        >>> import torch
        >>> follow(torch.tensor([[[0, 0], [2, 2]], [[0, 1], [1, 1]]])).tolist()
        [[[0, 0], [1, 1]], [[0, 1], [1, 1]]]
    """
    frames = np.asarray(labels)
    found, before, number = np.empty(frames.shape, np.int64), None, 0
    for names, frame in zip(found, frames, strict=True):
        values, island, sizes = np.unique(frame, return_inverse=True, return_counts=True)
        island, named = island.reshape(-1), np.full(len(values), -1)
        if before is not None:
            for old, new in _matches(before, island, sizes, least):
                named[new] = old
        new = named < 0
        named[new] = number + np.arange(new.sum())
        number += new.sum()
        before = named[island]
        names[:] = before.reshape(frame.shape)
    return torch.from_numpy(found)


def _matches(before, island, sizes, least):
    """Pairs (name, island) of the names of columns (n,) in a frame and their islands (n,) in the
    next, whose sizes are given."""
    names, old, old_sizes = np.unique(before, return_inverse=True, return_counts=True)
    both = np.bincount(old * len(sizes) + island, minlength=len(names) * len(sizes))
    both = both.reshape(len(names), len(sizes))
    overlap = both / (old_sizes[:, None] + sizes - both)
    overlap[overlap < least] = 0
    rows, columns = overlap.any(1).nonzero()[0], overlap.any(0).nonzero()[0]
    chosen = linear_sum_assignment(overlap[np.ix_(rows, columns)], maximize=True)
    pairs = zip(rows[chosen[0]], columns[chosen[1]], strict=True)
    return [(names[row], column) for row, column in pairs if overlap[row, column] > 0]


def lives(names):
    """The islands of a clip, one by one.

    Args:
        names: (F, S, S) integers, from `follow`.

    Returns:
        A list of dictionaries: `name`; `first` and `last` frame; `frames`, in how many it is;
        `size`, mean number of columns; `path`, distance that its centre of mass travels, and
        `shift`, distance between its first and its last place, both in columns.

    Example:
        >>> import torch
        >>> lives(torch.tensor([[[0, 0], [0, 0]], [[0, 1], [0, 1]]]))[0]
        {'name': 0, 'first': 0, 'last': 1, 'frames': 2, 'size': 3.0, 'path': 0.5, 'shift': 0.5}
    """
    names = np.asarray(names)
    n_frames, side, _ = names.shape
    number = int(names.max()) + 1
    cell = (np.arange(n_frames)[:, None, None] * number + names).ravel()
    rows, columns = (np.broadcast_to(x, names.shape).ravel() for x in np.mgrid[:side, :side])
    shape = n_frames, number
    sizes = np.bincount(cell, minlength=n_frames * number).reshape(shape)
    sums = (np.bincount(cell, x, n_frames * number).reshape(shape) for x in (rows, columns))
    with np.errstate(invalid="ignore"):
        centres = np.stack([x / sizes for x in sums], -1)  # NaN where an island is not
    found = []
    for name in range(number):
        there = sizes[:, name].nonzero()[0]
        way = centres[there, name]
        found.append(
            {
                "name": name,
                "first": int(there[0]),
                "last": int(there[-1]),
                "frames": len(there),
                "size": float(sizes[there, name].mean()),
                "path": float(np.linalg.norm(np.diff(way, axis=0), axis=1).sum()),
                "shift": float(np.linalg.norm(way[-1] - way[0])),
            }
        )
    return found


def summary(names):
    """How long the islands of a clip live and how far they go.

    Args:
        names: (F, S, S) integers, from `follow`.

    Returns:
        A dictionary: `number` of islands in a frame; `names`, different islands over all frames;
        `frames` and `path`, means over islands of those of `lives`; `frames_of_columns` and
        `path_of_columns`, the same means weighted by the size of the island, so that specks count
        little; `kept`, after the first frame, the share of columns whose island was already there
        in the frame before.
    """
    islands = lives(names)
    columns = np.array([island["size"] * island["frames"] for island in islands])
    means = {}
    for key in ("frames", "path"):
        values = np.array([island[key] for island in islands])
        means |= {
            key: float(values.mean()),
            f"{key}_of_columns": float((values * columns).sum() / columns.sum()),
        }
    n_frames = len(names)
    born = sum(  # columns of islands in their first frame
        int((names[island["first"]] == island["name"]).sum())
        for island in islands
        if island["first"] > 0
    )
    later = (n_frames - 1) * names[0].numel()
    return {
        "number": sum(island["frames"] for island in islands) / n_frames,
        "names": len(islands),
        **means,
        "kept": 1 - born / later if later else None,
    }


def over_time(names, masks):
    """The scores of `against_mask` over space and time: a clip counts as one image, so
    that an island has to follow its segment.

    Args:
        names: (B, F, S, S) integers from 0, from `follow` for each of B clips.
        masks: (B, F, H, W), whose segments have the same numbers in all frames.

    Returns:
        (ari, iou), each (B,).

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[[1, 2]], [[2, 1]]]])
        >>> names = torch.tensor([[[[0, 1], [0, 1]], [[1, 0], [1, 0]]]])
        >>> over_time(names, masks)[0].item()
        1.0
    """
    names, masks = torch.as_tensor(names), torch.as_tensor(masks)
    pixels = to_pixels(names, *masks.shape[2:])
    return against_mask(pixels.reshape(len(names), 1, -1), masks.reshape(len(masks), 1, -1))

"""A loss that asks the columns for islands, taught by the colours of the image alone.

It needs no masks. Below the top level, columns in one patch of even colour are to agree, and others
are not. On the top level, the background is to agree, the figures are to agree, and the two are not
to agree with each other. The background is what lies along the border of the image.
"""

import math

import torch
import torch.nn.functional as F

from agglomerator.training.losses.pairs import BOUNDARY, cross_entropy, over_pairs, unit_maps
from agglomerator.util.precision import upcast

COLOUR_WIDTH = 0.08  # standard deviation of the kernel of mean shift; colours are from 0 to 1
SAME_PATCH = 0.08  # colours that differ by less are of one patch
OTHER_PATCH = 0.16  # colours that differ by more are of two, also where columns are not neighbours
ALONG_BORDER = 1.5  # a patch with so many columns on the border, times the root of all its columns,
SMALL = 1 / 16  # or with at most this share of the columns, of which one is on it, is background
ROUNDS = 2  # for every doubling of the columns; to ask whether fewer do would wait for the GPU
SHIFTS = 4  # distant columns that each column is compared with


def mean_shift(colours, radius=2, iterations=4):
    """Smooth patches and keep edges: mean shift over colours (Comaniciu and Meer 2002).

    Every colour moves to the mean of the similar ones around it. Patches become even, and colours
    that are mixed at an edge move to one of its sides.

    Args:
        colours: (B, C, S, S), from 0 to 1.
        radius: of the neighbourhood, in columns; a column is not in its own.
        iterations: how often each colour moves.

    Returns:
        (B, C, S, S).
    """
    side = colours.shape[-1]
    reach = range(-radius, radius + 1)
    offsets = [(i, j) for i in reach for j in reach if 0 < i * i + j * j <= radius * radius]
    inside = F.pad(torch.ones_like(colours[:1, :1]), (radius,) * 4)

    def neighbours(padded):
        parts = [
            padded[..., radius + i : radius + i + side, radius + j : radius + j + side]
            for i, j in offsets
        ]
        return torch.stack(parts)

    inside = neighbours(inside)  # (offsets, 1, 1, S, S)
    for _ in range(iterations):
        near = neighbours(F.pad(colours, (radius,) * 4))  # (offsets, B, C, S, S)
        squares = (near - colours).square().sum(2, keepdim=True)
        weight = inside * torch.exp(squares / (-2 * COLOUR_WIDTH**2))
        colours = (1e-3 * colours + (weight * near).sum(0)) / (1e-3 + weight.sum(0))
    return colours


def border_background(colours):
    """Find the background: the patches that lie along the border of the image.

    A figure may touch the border too, but with little of its outline. So a patch of background has
    at least ALONG_BORDER times as many columns on the border as the square root of all its columns
    (the boundary connectivity of Zhu et al., "Saliency optimization from robust background
    detection", CVPR 2014). Small patches at the border are of the background too.

    Args:
        colours: (B, C, S, S), from 0 to 1, smoothed.

    Returns:
        (B, S, S) bool, True for background.
    """
    side, device = colours.shape[-1], colours.device
    patch = number_patches(colours).flatten(1)  # (B, n)
    inside = torch.ones(max(side - 2, 0), max(side - 2, 0), device=device)
    on_border = (F.pad(inside, (1,) * 4)[:side, :side] == 0).flatten().expand(len(patch), -1)
    none = torch.zeros(patch.shape, dtype=torch.float32, device=device)  # counts, also in bf16-true
    columns = none.scatter_add(1, patch, torch.ones_like(none))
    of_border = none.scatter_add(1, patch, on_border.to(none))
    is_small = columns <= SMALL * side * side
    is_background = (of_border >= ALONG_BORDER * columns.sqrt()) | (is_small & (of_border > 0))
    return is_background.gather(1, patch).unflatten(1, (side, side))


def number_patches(colours):
    """Number the patches of even colour: neighbours in a patch differ by less than SAME_PATCH.

    Columns that are joined come to point at the first of them, by the rounds of Zhang, Azad and Hu
    ("FastSV: a distributed-memory connected component algorithm with fast convergence", 2020).

    Args:
        colours: (B, C, S, S), from 0 to 1, smoothed.

    Returns:
        (B, S, S) int64, the place of the first column of each column's patch, row by row.
    """
    side, device = colours.shape[-1], colours.device
    right = (colour_difference(colours[..., 1:], colours[..., :-1]) < SAME_PATCH).long()
    down = (colour_difference(colours[..., 1:, :], colours[..., :-1, :]) < SAME_PATCH).long()
    steps = torch.stack(
        [F.pad(right, (0, 1)), -F.pad(right, (1, 0)),
         side * F.pad(down, (0, 0, 0, 1)), -side * F.pad(down, (0, 0, 1, 0))], 1
    )  # fmt: skip
    place = torch.arange(side * side, device=device).view(side, side)
    neighbours = (place + steps).flatten(1)  # (B, 4 n); a column stands in for one not joined
    parent = place.flatten().expand(len(colours), -1).contiguous()  # (B, n)
    for _ in range(ROUNDS * math.ceil(math.log2(side * side)) + 1):
        before = parent
        lowest = parent.gather(1, neighbours)  # halves twice, for `amin` over 4 is slow on a CPU
        for _ in range(2):
            lowest = torch.minimum(*lowest.chunk(2, 1))
        lowest = lowest.minimum(parent)
        parent = parent.scatter_reduce(1, parent, lowest, "amin").minimum(lowest)
        parent = parent.gather(1, parent)
        if device.type == "cpu" and torch.equal(parent, before):
            break
    return parent.unflatten(1, (side, side))


def colour_difference(colours, others):
    """Euclidean distance of colours: (B, C, ...) twice -> (B, ...)."""
    return (colours - others).norm(dim=1)


def agreement_loss(levels, colours, generator):
    """Tell how far the columns are from islands of colour, and on the top level of figures.

    Args:
        levels: (B, n, K, d), a state of the columns.
        colours: (B, C, H, W) of the images, from 0 to 1.
        generator: draws which distant columns are compared; on the CPU.

    Returns:
        A scalar, the mean over levels; half of it is from neighbours, half from distant columns.
    """
    vectors = unit_maps(levels)
    side = vectors.shape[-1]
    with torch.no_grad():
        smoothed = mean_shift(F.adaptive_avg_pool2d(upcast(colours), side))  # (B, C, S, S)
        background = border_background(smoothed)  # (B, S, S)

    maps = vectors, smoothed, background
    return over_pairs(pair_loss, maps, SHIFTS, generator)


def pair_loss(vectors, colours, background, neighbours):
    """Binary cross-entropy of pairs of columns: do the two agree where they should?

    Each of the first three is a pair of maps, in which a place holds the two columns of a pair.

    Args:
        vectors: (K, B, d, ...) twice, of unit length.
        colours: (B, C, ...) twice.
        background: (B, ...) twice, bool.
        neighbours: whether the two columns are neighbours on the grid.

    Returns:
        A scalar, the mean over levels and images of weighted means over pairs.
    """
    below_top = len(vectors[0]) - 1
    difference = colour_difference(*colours)
    same_patch, same_side = difference < SAME_PATCH, background[0] == background[1]
    target = torch.stack([same_patch] * below_top + [same_side])  # (K, B, ...)
    if neighbours:
        weight = 1 + (BOUNDARY - 1) * ~target
    else:  # colours that differ a little may be of one patch or of two: those pairs do not count
        is_clear = same_patch | (difference > OTHER_PATCH)
        weight = torch.stack([is_clear] * below_top + [torch.ones_like(is_clear)]).to(vectors[0])
    vectors = [x.flatten(0, 1) for x in vectors]
    return cross_entropy(vectors, target.flatten(0, 1), weight.flatten(0, 1))

"""A loss that asks columns for islands, of what an image itself shows to belong together.

It needs no masks. Low levels: columns in one patch of colour agree, others do not. Top level: what
is joined to the border of the image is ground, the rest figures (the boundary prior of Wei et al.,
"Geodesic saliency using background priors", ECCV 2012), and ground and figures do not agree.
"""

import math

import torch
import torch.nn.functional as F

from agglomerator.util.precision import upcast

WIDTH = 0.08  # of colours that attract each other, on the scale 0 to 1
STEP = 0.08  # least difference of settled colours that parts two neighbours
FAR = 0.16  # least difference that parts columns which are not neighbours
COSINE = 0.7  # where agreement begins, for the loss
SHARPNESS = 10.0  # change of the log odds of agreement with the cosine
BOUNDARY = 2.0  # weight of neighbours that are to differ: one that agrees joins two islands
SWEEPS = 4  # as many for every column on a side: to look whether it is done would wait for a GPU
SHIFTS = 4  # pairs of columns that are not neighbours, for each column


def mean_shift(colours, radius=2, iterations=4):
    """Mean shift (Comaniciu and Meer 2002): colours move to the mean of the like ones around.

    What is mixed at an edge settles for one side, patches become even, edges stay.

    Args:
        colours: (B, C, S, S) on the scale 0 to 1.
        radius: of the neighbours, in columns; a column is not among its own.

    Returns:
        (B, C, S, S).
    """
    side = colours.shape[-1]
    reach = range(-radius, radius + 1)
    offsets = [(i, j) for i in reach for j in reach if 0 < i * i + j * j <= radius * radius]
    inside = F.pad(torch.ones_like(colours[:1, :1]), (radius,) * 4)
    for _ in range(iterations):
        around = F.pad(colours, (radius,) * 4)
        total, weights = 1e-3 * colours, 1e-3
        for i, j in offsets:
            window = (
                ...,
                slice(radius + i, radius + i + side),
                slice(radius + j, radius + j + side),
            )
            other = around[window]
            distance = (other - colours).square().sum(1, keepdim=True)
            weight = inside[window] * torch.exp(distance / (-2 * WIDTH**2))
            total, weights = total + weight * other, weights + weight
        colours = total / weights
    return colours


def border_background(settled):
    """What steps smaller than STEP join to the border, by ways of SWEEPS * S columns or less:
    colours (B, C, S, S) -> (B, S, S) bool."""
    beside = distance(settled[..., 1:], settled[..., :-1]) < STEP
    above = distance(settled[..., 1:, :], settled[..., :-1, :]) < STEP
    ground = torch.zeros_like(settled[:, 0], dtype=torch.bool)
    for border in (ground[:, 0], ground[:, -1], ground[..., 0], ground[..., -1]):
        border.fill_(True)
    for _ in range(SWEEPS * settled.shape[-1]):
        ground[:, :, 1:] |= ground[:, :, :-1] & beside
        ground[:, :, :-1] |= ground[:, :, 1:] & beside
        ground[:, 1:] |= ground[:, :-1] & above
        ground[:, :-1] |= ground[:, 1:] & above
    return ground


def distance(colours, others):
    """(B, C, ...) twice -> (B, ...)."""
    return (colours - others).norm(dim=1)


def agreement_loss(levels, colours, generator):
    """How far columns are from islands of colour, and on the top level of figures.

    Args:
        levels: (B, n, K, d), a state of the columns.
        colours: (B, C, H, W) of the images, on the scale 0 to 1.
        generator: on the CPU; says which pairs that are not neighbours are looked at.

    Returns:
        A scalar, the mean over levels.
    """
    vectors = F.normalize(upcast(levels), dim=-1).permute(2, 0, 3, 1)  # (K, B, d, n)
    side = math.isqrt(vectors.shape[-1])
    vectors = vectors.unflatten(3, (side, side))
    with torch.no_grad():
        settled = mean_shift(F.adaptive_avg_pool2d(upcast(colours), side))
        ground = border_background(settled)

    def loss(select, near):
        """Of pairs of columns: `select` makes of maps (..., S, S) those of the two ends."""
        (one, two), (a, b), (g, h) = select(vectors), select(settled), select(ground)
        step = distance(a, b)
        patch, figure = step < STEP, g == h
        agree = torch.stack([patch] * (len(vectors) - 1) + [figure])  # (K, B, S, S)
        odds = SHARPNESS * ((one * two).sum(2) - COSINE)
        each = F.binary_cross_entropy_with_logits(odds, agree.to(odds), reduction="none")
        if near:
            weight = 1 + (BOUNDARY - 1) * ~agree
        else:  # between the two differences either may be true
            clear = patch | (step > FAR)
            weight = torch.stack([clear] * (len(vectors) - 1) + [clear | True]).to(odds)
        return ((each * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)).mean()

    beside = loss(lambda x: (x[..., 1:], x[..., :-1]), near=True)
    above = loss(lambda x: (x[..., 1:, :], x[..., :-1, :]), near=True)
    shifts = torch.randint(side, (SHIFTS, 2), generator=generator).tolist()
    far = [loss(lambda x, s=s: (x, x.roll(s, (-2, -1))), near=False) for s in shifts]
    return (beside + above) / 4 + sum(far) / (2 * SHIFTS)

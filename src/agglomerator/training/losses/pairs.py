"""Pairs of columns that are to agree or to differ: what the losses that ask for islands share."""

import math

import torch
import torch.nn.functional as F

from agglomerator.util.precision import upcast

COSINE = 0.7  # of two columns that agree as much as not
SHARPNESS = 10.0  # the logit of agreement, for a cosine of 1 more
BOUNDARY = 2.0  # weight of neighbours that are to differ: if one pair agrees, two islands join


def unit_maps(states):
    """States (B, n, K, d) -> unit vectors (K, B, d, S, S)."""
    vectors = F.normalize(upcast(states), dim=-1).permute(2, 0, 3, 1).contiguous()
    side = math.isqrt(vectors.shape[-1])
    return vectors.unflatten(3, (side, side))


def over_pairs(loss, maps, shifts, generator):
    """The mean of a loss over pairs of columns; half of it is from neighbours, half from distant
    columns.

    Args:
        loss: function of a pair of each map, in which a place holds the two columns of a pair, and
            of `neighbours`, whether the two are neighbours on the grid.
        maps: tensors (..., S, S).
        shifts: number of distant columns that each column is compared with.
        generator: draws them; on the CPU.
    """
    horizontal = loss(*((x[..., 1:], x[..., :-1]) for x in maps), neighbours=True)
    vertical = loss(*((x[..., 1:, :], x[..., :-1, :]) for x in maps), neighbours=True)
    moves = torch.randint(maps[0].shape[-1], (shifts, 2), generator=generator).tolist()
    distant = [
        loss(*((x, x.roll(move, (-2, -1))) for x in maps), neighbours=False) for move in moves
    ]
    return (horizontal + vertical) / 4 + sum(distant) / (2 * shifts)


def cross_entropy(vectors, target, weight):
    """Binary cross-entropy of pairs of columns: do the two agree where they should?

    Args:
        vectors: (N, ..., d, H, W) twice, of unit length.
        target: (N, ..., H, W) bool, whether the two are to agree.
        weight: (N, ..., H, W), of a pair.

    Returns:
        A scalar, the mean over N of weighted means over pairs.
    """
    logits = SHARPNESS * ((vectors[0] * vectors[1]).sum(-3) - COSINE)
    losses = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    return ((losses * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)).mean()

"""A loss that asks the columns for islands, taught by composites of images.

It knows nothing of colours, borders or masks: two columns are to agree if they lie on the same
piece of an image that was put together from others (`agglomerator.data.composites`), and not to
agree if they lie on different ones. What a column learns is how likely two places belong together
in photographs (Isola et al., "Crisp boundary detection using pointwise mutual information", ECCV
2014, asked that of colours alone).
"""

import math

import torch
import torch.nn.functional as F

from agglomerator.training.agreement import BOUNDARY, COSINE, SHARPNESS
from agglomerator.util.precision import upcast

SHIFTS = 6  # distant columns that each column is compared with


def unit_maps(states):
    """States (B, n, K, d) -> unit vectors (K, B, d, S, S)."""
    vectors = F.normalize(upcast(states), dim=-1).permute(2, 0, 3, 1)
    side = math.isqrt(vectors.shape[-1])
    return vectors.unflatten(3, (side, side))


def composite_loss(levels, pieces, generator):
    """The loss of composites made by `compose`: figures teach the top level, pieces those below.

    Args:
        levels: (K, 2B, d, S, S), of unit length.
        pieces: (2B, H, W) integers.
        generator: as for `piece_loss`.

    Returns:
        A scalar, the sum of the top level's loss and the mean of those of the levels below.
    """
    n = len(pieces) // 2
    lower = [piece_loss(level[n:], pieces[n:], generator, ground=0) for level in levels[:-1]]
    return piece_loss(levels[-1, :n], pieces[:n], generator) + sum(lower) / len(lower)


def piece_loss(vectors, pieces, generator, ground=None):
    """Tell how far columns are from agreeing on each piece, and only there.

    Args:
        vectors: (B, d, S, S), of unit length.
        pieces: (B, H, W) integers: the piece of each pixel. A column lies on the piece of the pixel
            in its middle.
        generator: draws which distant columns are compared; on the CPU.
        ground: the number of a piece of which nothing is known: it is not asked to agree with
            itself. None if there is none.

    Returns:
        A scalar; half of it is from neighbours, half from distant columns.
    """
    side = vectors.shape[-1]
    middles = [torch.arange(side, device=pieces.device) * n // side + n // (2 * side)
               for n in pieces.shape[-2:]]  # fmt: skip
    maps = vectors, pieces[:, middles[0][:, None], middles[1]]
    across = [x[..., 1:] for x in maps], [x[..., :-1] for x in maps]
    down = [x[..., 1:, :] for x in maps], [x[..., :-1, :] for x in maps]
    shifts = torch.randint(side, (SHIFTS, 2), generator=generator).tolist()
    distant = [
        _pair_loss(maps, [x.roll(shift, (-2, -1)) for x in maps], 1.0, ground) for shift in shifts
    ]
    near = sum(_pair_loss(*pair, BOUNDARY, ground) for pair in (across, down))
    return near / 4 + sum(distant) / (2 * SHIFTS)


def _pair_loss(one, other, boundary, ground):
    """Mean over images of the weighted mean cross-entropy of pairs; those that are to differ have
    the weight `boundary`."""
    same = one[1] == other[1]
    logits = SHARPNESS * ((one[0] * other[0]).sum(1) - COSINE)
    losses = F.binary_cross_entropy_with_logits(logits, same.to(logits), reduction="none")
    weight = torch.where(same, 1.0, boundary)
    if ground is not None:
        weight = weight.masked_fill(same & (one[1] == ground), 0.0)
    return ((losses * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)).mean()

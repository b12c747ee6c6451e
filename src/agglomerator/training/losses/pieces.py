"""A loss that asks the columns for islands, taught by composites of images, or by a `Teacher`.

It knows nothing of colours, borders or masks: two columns are to agree if they lie on the same
piece of an image that was put together from others (`agglomerator.data.composites`), and not to
agree if they lie on different ones. What a column learns is how likely two places belong together
in photographs (Isola et al., "Crisp boundary detection using pointwise mutual information", ECCV
2014, asked that of colours alone).
"""

from functools import partial

import torch

from agglomerator.training.losses.pairs import BOUNDARY, cross_entropy, over_pairs

SHIFTS = 6  # distant columns that each column is compared with


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


def taught_loss(levels, islands, generator):
    """The loss of views whose islands a `Teacher` told.

    Args:
        levels: (K, B, d, S, S), of unit length.
        islands: (B, K, S, S) integers.
        generator: as for `piece_loss`.

    Returns:
        A scalar, the sum of the top level's loss and the mean of those of the levels below.
    """
    each = [piece_loss(level, islands[:, k], generator) for k, level in enumerate(levels)]
    return each[-1] + sum(each[:-1]) / max(len(each) - 1, 1)


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
    loss = partial(_pair_loss, ground=ground)
    return over_pairs(loss, maps, SHIFTS, generator)


def _pair_loss(vectors, pieces, neighbours, ground):
    """The loss of pairs of columns; neighbours that are to differ count `BOUNDARY` times."""
    same = pieces[0] == pieces[1]
    weight = torch.where(same, 1.0, BOUNDARY if neighbours else 1.0)
    if ground is not None:
        weight = weight.masked_fill(same & (pieces[0] == ground), 0.0)
    return cross_entropy(vectors, same, weight)

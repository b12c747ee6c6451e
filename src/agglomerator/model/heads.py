"""The heads: from the top level to the embedding, and from that to classes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from agglomerator.config.checks import WINDOW
from agglomerator.util.precision import upcast, without_autocast


class GridPool(nn.Module):
    """Means of the columns in the cells of a coarser grid: (B, n, d) -> (B, d * side^2).

    A mean over all columns would say little. The last norm of the column nets is over the columns:
    what they add has the same mean for every image, as long as that norm scales columns alike.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, columns):
        grid = columns.mT.unflatten(2, (math.isqrt(columns.shape[1]), -1))  # (B, d, S, S)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(1)


class WindowSum(nn.Module):
    """Sums over windows of 4x4 columns, in which columns unlike the others weigh most (Zeng et al.,
    "Agreement aware and dissimilarity oriented GLOM", ICCV 2025): (B, n, d) -> (B, n / 16, d).

    With s_ij the cosine of two columns of a window, w_i = sum_j exp(1 - s_ij), divided by the
    greatest of the window; the sum is that of w_i l_i. Windows are row-major.
    """

    def forward(self, columns):
        side = math.isqrt(columns.shape[1]) // WINDOW
        grid = columns.unflatten(1, (side, WINDOW, side, WINDOW)).transpose(2, 3)
        windows = grid.flatten(3, 4).flatten(1, 2)  # (B, n / 16, 16, d)
        unit = F.normalize(upcast(windows), dim=-1)
        with without_autocast(columns.device):
            weights = (1 - unit @ unit.mT).exp().sum(-1)  # (B, n / 16, 16)
        weights = weights / weights.amax(-1, keepdim=True)
        return (weights[..., None].to(windows.dtype) * windows).sum(2)


class Mean(nn.Module):
    """The mean of all columns: (B, n, d) -> (B, d)."""

    def forward(self, columns):
        return columns.mean(1)


def contrastive_head(settings):
    """Top level (B, n, d) -> embedding (B, embedding_dim), not yet of unit length.

    The kind "flatten", as published, has (n d)^2 weights; "dissimilarity" is the same after a sum
    over windows; "grid" has head_side^2 d contr_dim, however many columns there are; "mean" has
    the 2 d of its norm, without which the mean would say little (see `GridPool`).
    """
    s, windows = settings, []
    if s.head == "mean":
        return nn.Sequential(nn.LayerNorm(s.patch_dim), Mean())
    if s.head == "grid":
        pool, width = GridPool(s.head_side), s.head_side**2 * s.patch_dim
    else:
        pool, width = nn.Flatten(), s.n_columns * s.patch_dim
    if s.head == "dissimilarity":
        windows, width = [WindowSum()], width // WINDOW**2
    hidden = s.contr_dim if s.head == "grid" else width
    return nn.Sequential(
        *windows,
        nn.LayerNorm(s.patch_dim),
        nn.Dropout(s.dropout),
        pool,  # (B, width)
        nn.LayerNorm(width),
        nn.Dropout(s.dropout),
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.LayerNorm(hidden),
        nn.Dropout(s.dropout),
        nn.Linear(hidden, s.contr_dim),
    )


def classifier(settings):
    """Embedding (B, embedding_dim) -> logits (B, n_classes). That of the mean of the columns is
    linear, after a norm, which undoes its unit length."""
    width, n_classes = settings.embedding_dim, settings.n_classes
    if settings.head == "mean":  # the last index is the same in all
        return nn.Sequential(nn.LayerNorm(width), nn.Identity(), nn.Linear(width, n_classes))
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_classes))


@torch.no_grad()
def start_from_means(head, means, scale):
    """Set the weights of a `classifier` so that its logits are scale * cosine of an embedding and
    the class means.

    GELU(a) - GELU(-a) = a for every a, so that pairs of hidden units pass linear maps unchanged.
    With more classes than pairs, the means keep the directions in which they differ most. Hidden
    units that are left over keep their weights and do not contribute at first.

    Args:
        head: from `classifier`.
        means: (n_classes, contr_dim), rows of unit length, or 0 for a class without images, whose
            logit is then 0.
        scale: of the logits, such as the inverse temperature of the contrastive loss.

    Example:
        >>> from agglomerator.config import Settings
        >>> head = classifier(Settings(contr_dim=4, n_classes=2))
        >>> start_from_means(head, torch.eye(4)[:2], 10)
        >>> head(torch.eye(4)).round().abs().tolist()
        [[10.0, 0.0], [0.0, 10.0], [0.0, 0.0], [0.0, 0.0]]
    """
    first, _, last = head
    pairs = min(len(means), first.in_features // 2)
    u, s, v = torch.linalg.svd(means.cpu().double(), full_matrices=False)
    gain = scale**0.5
    into, out = gain * v[:pairs], gain * u[:, :pairs] * s[:pairs]
    hidden = slice(0, 2 * pairs)
    first.weight[hidden] = torch.cat((into, -into)).to(first.weight)
    first.bias[hidden] = 0
    last.weight.zero_()
    last.weight[:, hidden] = torch.cat((out, -out), 1).to(last.weight)
    last.bias.zero_()

"""The column nets: bottom-up and top-down."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LevelLinear(nn.Module):
    """A linear map of its own for every level, one matrix product over all columns of the batch.

    The weight is stored as that of a grouped 1x1 convolution, (K * d_out, d_in, 1), level by
    level, or with the levels in reversed order.
    """

    def __init__(self, levels, d_in, d_out, reverse=False):
        super().__init__()
        self.levels, self.reverse = levels, reverse
        self.weight = nn.Parameter(torch.empty(levels * d_out, d_in, 1))
        self.bias = nn.Parameter(torch.empty(levels * d_out))
        bound = 1 / math.sqrt(d_in)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def of(self, level):
        """Weight (d_out, d_in) and bias (d_out, 1) of a level."""
        group = self.levels - 1 - level if self.reverse else level
        weight = self.weight.view(self.levels, -1, self.weight.shape[1])
        return weight[group], self.bias.view(self.levels, -1, 1)[group]

    def forward(self, x, level):
        """(d_in, m) -> (d_out, m)."""
        weight, bias = self.of(level)
        return torch.addmm(bias, weight, x)


class Sine(nn.Module):
    """The sine as activation."""

    def forward(self, x):
        return x.sin()


class ColumnNet(nn.Module):
    """The two-layer net of every level, the same in all columns.

    LayerNorm over the n columns (not over channels), linear d -> 4d, activation, LayerNorm over
    the n columns, linear 4d -> d. Each level has its linear maps; the norms are shared by all.
    """

    def __init__(self, levels, d, n_columns, activation, reverse=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Identity(),
            nn.LayerNorm(n_columns),
            LevelLinear(levels, d, 4 * d, reverse),
            activation,
            nn.LayerNorm(n_columns),
            LevelLinear(levels, 4 * d, d, reverse),
        )

    def forward(self, x, level, share):
        """What the net of a level makes of x, times a factor: (d, B, n) -> (d, B, n)."""
        _, norm, expand, activation, norm_hidden, contract = self.net
        b, n = x.shape[1:]
        hidden = activation(expand(norm(x).flatten(1), level)).unflatten(1, (b, n))  # (4d, B, n)
        # Scale and shift of a column, and the share, commute with the linear map over channels:
        # done after it, in one step, they touch a quarter of the numbers.
        weight, bias = contract.of(level)
        out = (weight @ standardize(hidden).to(hidden.dtype).flatten(1)).unflatten(1, (b, n))
        shift = weight.sum(1)[:, None, None] * norm_hidden.bias + bias[..., None]
        return torch.addcmul(share * shift, out, share * norm_hidden.weight)


def standardize(x):
    """Mean 0 and variance 1 over the last dimension: LayerNorm without scale and shift."""
    return F.layer_norm(x, x.shape[-1:])  # sums in float32, whatever it is given

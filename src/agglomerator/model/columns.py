"""The column nets, bottom-up and top-down."""

import torch
import torch.nn.functional as F
from torch import nn


class LevelLinear(nn.Conv1d):
    """A linear map for every level. The weight is stored as published, as that of a grouped 1x1
    convolution, (K * d_out, d_in, 1), level by level; with `reverse` from the highest level down.
    """

    def __init__(self, levels, d_in, d_out, reverse=False):
        super().__init__(levels * d_in, levels * d_out, 1, groups=levels)
        self.levels, self.reverse = levels, reverse

    def of(self, level):
        """Weight (d_out, d_in) and bias (d_out, 1) of a level."""
        group = self.levels - 1 - level if self.reverse else level
        weight = self.weight.view(self.levels, -1, self.weight.shape[1])
        return weight[group], self.bias.view(self.levels, -1, 1)[group]

    def forward(self, x, level):
        """(d_in, B, n) -> (d_out, B, n), one matrix product."""
        weight, bias = self.of(level)
        return torch.addmm(bias, weight, x.flatten(1)).unflatten(1, x.shape[1:])


class Sine(nn.Module):
    """The sine as activation."""

    def forward(self, x):
        return x.sin()


class ColumnNet(nn.Module):
    """The two-layer net of every level, the same in all columns.

    LayerNorm over the n columns (not over channels), linear d -> 4d, activation, LayerNorm over
    the n columns, linear 4d -> d. Each level has its own linear maps; all share the norms, whose
    scale and shift for each place are left out unless `places`.
    """

    def __init__(self, levels, d, n_columns, activation, reverse=False, places=True):
        super().__init__()
        self.net = nn.Sequential(
            nn.Identity(),  # the published net has no weights here: names count from net.1
            nn.LayerNorm(n_columns, elementwise_affine=places),
            LevelLinear(levels, d, 4 * d, reverse),
            activation,
            nn.LayerNorm(n_columns, elementwise_affine=places),
            LevelLinear(levels, 4 * d, d, reverse),
        )

    def plain(self, x, level):
        """The net of a level: (d, B, n) -> (d, B, n)."""
        _, norm, expand, activation, norm_hidden, contract = self.net
        hidden = activation(expand(norm(x), level))  # (4d, B, n)
        return contract(norm_hidden(hidden), level)

    def forward(self, x, level, scale):
        """scale * plain(x, level), in fewer operations.

        The second norm's weight and bias, (n,), and the scale commute with the linear map over
        channels. Applied after it, they touch a quarter of the numbers.
        """
        _, norm, expand, activation, norm_hidden, contract = self.net
        hidden = activation(expand(norm(x), level))  # (4d, B, n)
        standard = F.layer_norm(hidden, hidden.shape[-1:])  # computes and may return float32
        weight, bias = contract.of(level)
        out = (weight @ standard.to(hidden.dtype).flatten(1)).unflatten(1, x.shape[1:])
        if norm_hidden.weight is None:
            return scale * (out + bias[..., None])
        shift = weight.sum(1)[:, None, None] * norm_hidden.bias + bias[..., None]  # (d, 1, n)
        return torch.addcmul(scale * shift, out, scale * norm_hidden.weight)

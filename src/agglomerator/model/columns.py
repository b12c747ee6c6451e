"""The column nets, bottom-up and top-down."""

import torch
import torch.nn.functional as F
from torch import nn

from agglomerator.util.precision import as_products, without_autocast


class LevelLinear(nn.Conv1d):
    """A linear map for every level. The weight is stored as published, as that of a grouped 1x1
    convolution, (K * d_out, d_in, 1), level by level; with `reverse` from the highest level down.
    """

    def __init__(self, levels, d_in, d_out, reverse=False):
        super().__init__(levels * d_in, levels * d_out, 1, groups=levels)
        self.levels, self.reverse = levels, reverse

    def of_levels(self):
        """Weights (K, d_out, d_in) and biases (K, d_out, 1), from level 0 up."""
        weight = self.weight.view(self.levels, -1, self.weight.shape[1])
        both = weight, self.bias.view(self.levels, -1, 1)
        return tuple(x.flip(0) for x in both) if self.reverse and self.levels > 1 else both

    def forward(self, x, level):
        """(d_in, B, n) -> (d_out, B, n), one matrix product."""
        weight, bias = (x[level] for x in self.of_levels())
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

    def scaled(self, scale):
        """What computes scale * plain(x, level) for several levels at once: a `ScaledNet`."""
        return ScaledNet(self, scale)


class ScaledNet:
    """A column net times a number for each level, in few operations.

    What no image changes is computed once, for all iterations. The second norm's weight and bias,
    (n,), and the scale commute with the linear map over channels. Applied after it, they touch a
    quarter of the numbers.

    Args:
        net: the `ColumnNet`.
        scale: (K, 1, 1, 1), or a number for all levels.
    """

    def __init__(self, net, scale):
        _, self.norm, expand, self.activation, norm_hidden, contract = net.net
        weight, bias = expand.of_levels()
        last, shift = contract.of_levels()
        if norm_hidden.weight is not None:
            shift = torch.addcmul(shift, last.sum(2, keepdim=True), norm_hidden.bias)  # (K, d, n)
            factor = (scale * norm_hidden.weight).expand(len(weight), 1, 1, -1)
        else:
            factor = torch.as_tensor(scale).expand(len(weight), 1, 1, 1)
        self.parts = (
            as_products(weight), as_products(bias), as_products(last),
            (scale * shift[:, :, None]), factor,
        )  # fmt: skip
        self.spans = {(0, len(weight)): self.parts}

    def __call__(self, x, first):
        """Levels `first` and following: (k, d, B, n) -> (k, d, B, n)."""
        span = first, first + len(x)
        if span not in self.spans:
            self.spans[span] = tuple(part[slice(*span)] for part in self.parts)
        weight, bias, last, shift, scale = self.spans[span]
        hidden = torch.baddbmm(bias, weight, self.norm(x).flatten(2))  # (k, 4d, B n)
        hidden = self.activation(hidden).unflatten(2, x.shape[2:])
        with without_autocast(x.device):  # it computes in float32, whatever it takes and returns
            standard = F.layer_norm(hidden, hidden.shape[-1:])
        out = (last @ standard.flatten(2)).unflatten(2, x.shape[2:])
        return out * scale + shift

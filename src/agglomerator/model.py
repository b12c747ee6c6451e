"""The Agglomerator network: tokenizer, column nets, consensus, the column loop, heads.

Garau, Bisagno, Sambugaro, Conci, "Interpretable part-whole hierarchies and conceptual-semantic
relationships in neural networks", CVPR 2022, arXiv 2203.03282; Hinton, "How to represent part-whole
hierarchies in a neural network", arXiv 2102.12627. Read it from top to bottom.

Shapes: B images, G cells on a side of the tokenizer's grid, p cells on a side of a patch,
S = G / p columns on a side, n = S * S columns (row-major), K levels of width d. In the loop a state
is a list of its levels from the bottom: (d, B, n), or (d, 1, n) of those that have not heard of the
images yet.
Parameters bear the names of the published state dict, so that published weights load as they are.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from agglomerator.precision import at_least_float, without_autocast
from agglomerator.processes import BatchNorm2d
from agglomerator.settings import Settings

SELF_SCORE = -5e-4


def convolution(c_in, c_out, stride=1):
    """3x3 convolution without bias, BatchNorm, ReLU: three modules."""
    conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    if c_in == 1:
        # The stride of a dimension of size 1 says nothing, but DistributedDataParallel compares it
        # with that of the gradient, which is laid out channels last as the images are.
        conv.weight.data = conv.weight.data.clone(memory_format=torch.channels_last)
    return conv, BatchNorm2d(c_out), nn.ReLU()


def pooled(c_in, c_out, stride):
    """The same with the largest of each square kept, before BatchNorm and ReLU have to see all."""
    conv, *others = convolution(c_in, c_out)
    return conv, nn.MaxPool2d(stride, ceil_mode=True), *others


class Residual(nn.Module):
    """Two convolutions whose result is added to their input (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            *convolution(channels, channels), *convolution(channels, channels)
        )

    def forward(self, x):
        return x + self.block(x)


class Tokenizer(nn.Module):
    """Convolutional tokenizer.

    (B, n_channels, image_size, image_size) -> (B, E, G, G), where G is image_size / stride,
    rounded up.

    Args:
        n_channels: channels of the images.
        channels: E, channels of the output.
        stride: 4 as published (the first convolution and the pooling halve the grid), 2 (only the
            convolution does) or 1.
        kind: "convmlp" as published (ConvMLP, Li et al. 2021, arXiv 2109.04454): convolutions, then
            pooling. "residual": two convolutions, pooling, residual blocks of twice the width on
            the output grid, and a convolution. "vgg" (Simonyan and Zisserman 2015, arXiv
            1409.1556): convolutions on the grid of the image, on half and on a quarter of it,
            twice as wide on the next; the first to be wider is pooled.
        width: channels of the first convolution, of convmlp also of all others but the last; None
            for E / 2, as published.
        depth: number of convolutions of convmlp, 3 as published; of residual blocks; of
            convolutions of vgg's greatest width.
    """

    def __init__(self, n_channels, channels, stride=4, kind="convmlp", width=None, depth=3):
        super().__init__()
        conv_stride, pool_stride = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
        width = width or channels // 2
        pool = nn.MaxPool2d(3, stride=pool_stride, padding=1)
        if kind == "vgg":
            layers = [*convolution(n_channels, width), *pooled(width, 2 * width, conv_stride)]
            layers += convolution(2 * width, 2 * width)
            layers += pooled(2 * width, 4 * width, pool_stride)
            for _ in range(depth - 1):
                layers += convolution(4 * width, 4 * width)
            layers += convolution(4 * width, channels)
        elif kind == "convmlp":
            layers = [*convolution(n_channels, width, conv_stride)]
            for _ in range(depth - 2):
                layers += convolution(width, width)
            layers += [*convolution(width, channels), pool]
        else:
            layers = [*convolution(n_channels, width, conv_stride)]
            layers += [*convolution(width, 2 * width), pool]
            layers += [Residual(2 * width) for _ in range(depth)]
            layers += convolution(2 * width, channels)
        self.block = nn.Sequential(*layers)

    def forward(self, images):
        # Channels last: no conversion of layouts around each convolution. Images of one channel are
        # contiguous either way; a copy alone says which is meant, and makes the layers that follow
        # half as fast again.
        return self.block(images.clone(memory_format=torch.channels_last))


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


def distances(grid_size):
    """Distances between the columns of a grid: (n, n) float64, exact where they are integers."""
    side = torch.arange(grid_size, dtype=torch.float64)
    place = torch.cartesian_prod(side, side)  # (n, 2), row-major
    return torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist")


class ConsensusAttention(nn.Module):
    """Attention among the columns of an image, for each level apart, without learned projections.

    q = L, key = L / |L|, value = L; a column's score with itself is -5e-4 unless `consensus_self`;
    with a radius r > 0, which may be a fraction, columns farther apart than r on the grid do not
    attend to each other. With a temperature t the score is the cosine of two columns over t,
    whatever their lengths: a step of mean shift (Comaniciu and Meer 2002) over directions, which
    draws like vectors together.
    """

    def __init__(self, grid_size, consensus_self=False, radius=0, temperature=None):
        super().__init__()
        self.consensus_self, self.radius, self.temperature = consensus_self, radius, temperature
        if radius > 0:
            self.register_buffer("non_local_mask", (distances(grid_size) > radius)[None])
            self.reach = int(min(radius, grid_size - 1))  # in columns along a side
            self.tile = min(grid_size, max(4, 2 * self.reach))
            self.beyond = -grid_size % self.tile  # columns that the last tiles lack
            number = torch.arange(1.0, grid_size**2 + 1)[None, None]  # 0 is outside the grid
            query, key = (self._windows(number, around)[0, :, 0] for around in (0, self.reach))
            query, key = query[..., None].long(), key[:, None].long()
            far = F.pad(self.non_local_mask[0], (1, 0, 1, 0), value=True)[query, key]
            # Tiles may reach beyond the grid: what is computed there is not used, but finite.
            self.register_buffer("too_far", far & (query > 0), persistent=False)
            self.register_buffer("itself", query == key, persistent=False)

    def forward(self, level):
        """(d, B, n) -> (d, B, n)."""
        agree = self._agree_near if self.radius > 0 else self._agree
        value = level.transpose(0, 1).contiguous()  # (B, d, n)
        # The weights of a column sum to 1, so that the mean of all columns passes unchanged. Left
        # out of the product, it leaves columns that are equal, or nearly so, free of rounding
        # noise, which each norm over columns would magnify, by up to 1 / sqrt(eps).
        mean = value.mean(2, keepdim=True)
        return (mean + agree(value, value - mean)).transpose(0, 1)

    def _query(self, value):
        if self.temperature is None:
            return value
        return F.normalize(value, dim=1) * (math.sqrt(value.shape[1]) / self.temperature)

    def _key(self, value):
        """L / (|L| sqrt(d))."""
        wide = at_least_float(value)
        squares = wide.square().sum(1, keepdim=True)
        return (wide * (squares * value.shape[1]).rsqrt()).to(value.dtype)

    def _scores(self, query, key):
        """(..., d, n), (..., d, m) -> (..., n, m)."""
        if self.temperature is None:
            return query.mT @ key
        with without_autocast(query.device):  # a low temperature magnifies rounding errors
            return at_least_float(query).mT @ at_least_float(key)

    def _attend(self, query, key, deviation, itself, too_far=None):
        """Means of the columns' deviations by softmax of their scores.

        (..., d, n), (..., d, m), (..., d, m), masks (..., n, m) -> (..., d, n).
        """
        scores = self._scores(query, key)
        if not self.consensus_self:
            scores = scores.masked_fill(itself, SELF_SCORE)
        if too_far is not None:
            scores = scores.masked_fill(too_far, -math.inf)
        return deviation @ scores.softmax(-1).to(deviation.dtype).mT

    def _agree(self, value, deviation):
        """Every column attends to all: (B, d, n), (B, d, n) -> (B, d, n)."""
        itself = torch.eye(value.shape[2], dtype=torch.bool, device=value.device)
        return self._attend(self._query(value), self._key(value), deviation, itself)

    def _agree_near(self, value, deviation):
        """The same within the radius. Square tiles of columns attend to the windows around them:
        the work grows with n, not with n * n."""
        side = math.isqrt(value.shape[2])
        query = self._windows(self._query(value), 0)
        key, near = (self._windows(x, self.reach) for x in (self._key(value), deviation))
        agreed = self._attend(query, key, near, self.itself, self.too_far)
        tiles = agreed.flatten(2).mT  # (B, d * tile * tile, T)
        grid = F.fold(tiles, side + self.beyond, self.tile, stride=self.tile)
        return grid[:, :, :side, :side].flatten(2)

    def _windows(self, columns, around):
        """(B, c, n) -> (B, T, c, w * w): T tiles, each with `around` columns more on every side."""
        c, side = columns.shape[1], math.isqrt(columns.shape[2])
        grid = F.pad(columns.unflatten(2, (side, side)), (0, self.beyond) * 2)
        width = self.tile + 2 * around
        windows = F.unfold(grid, width, padding=around, stride=self.tile)
        return windows.mT.unflatten(2, (c, -1))


class GridPool(nn.Module):
    """Means of the columns in the cells of a coarser grid: (B, n, d) -> (B, d * side * side).

    A mean over all columns would say little: the last norm of the column nets is over the columns,
    so that while it scales them alike, what they add has the same mean for every image.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, columns):
        grid = columns.mT.unflatten(2, (math.isqrt(columns.shape[1]), -1))  # (B, d, S, S)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(1)


def contrastive_head(kind, n_columns, d, contr_dim, dropout, side):
    """Top level (B, n, d) -> embedding (B, contr_dim), not yet of unit length.

    Of the kind "flatten", as published, it has (n * d)^2 weights; of the kind "grid"
    side^2 d contr_dim, however many columns there are.
    """
    if kind == "flatten":
        pool, width, hidden = nn.Flatten(), n_columns * d, n_columns * d
    else:
        pool, width, hidden = GridPool(side), side**2 * d, contr_dim
    return nn.Sequential(
        nn.LayerNorm(d),
        nn.Dropout(dropout),
        pool,
        nn.LayerNorm(width),
        nn.Dropout(dropout),
        nn.Linear(width, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.LayerNorm(hidden),
        nn.Dropout(dropout),
        nn.Linear(hidden, contr_dim),
    )


def _columns(state, n_images):
    """List of K levels -> (B, n, K, d)."""
    return torch.stack([level.expand(-1, n_images, -1) for level in state]).permute(2, 3, 0, 1)


class Agglomerator(nn.Module):
    """Images -> columns of levels that come to agree -> embedding -> classes.

    Args:
        **flags: settings by the names of the flags, with their defaults (`Settings`). Those that
            do not concern the network are accepted and have no effect here.

    Raises:
        UserError: the settings do not make a network; the message names values that do.
        TypeError: there is no setting of that name.

    Example:
        >>> model = Agglomerator(patch_dim=64, image_size=28, conv_image_size=7, n_channels=1)
        >>> model(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 512])
    """

    def __init__(self, **flags):
        super().__init__()
        self.settings = s = Settings(**flags)
        d, n = s.patch_dim, s.n_columns
        self.image_to_tokens = nn.Sequential(
            Tokenizer(
                s.n_channels,
                s.token_channels,
                s.tokenizer_stride,
                s.tokenizer,
                s.tokenizer_width,
                s.tokenizer_depth,
            ),
            Rearrange("b e (i p) (j q) -> (e p q) b (i j)", p=s.patch_size, q=s.patch_size),
        )
        self.init_levels = nn.Parameter(torch.randn(s.levels, d))
        self.bottom_up = ColumnNet(s.levels, d, n, nn.GELU())
        # Stored in reversed order: the first group of weights serves level K-2, the last level 0.
        self.top_down = ColumnNet(s.levels - 1, d, n, Sine(), reverse=True)
        self.attention = ConsensusAttention(
            s.grid_size, s.consensus_self, s.local_consensus_radius, s.consensus_temperature
        )
        self.wl = nn.Parameter(torch.tensor(0.25))
        self.wBU = nn.Parameter(torch.tensor(0.25))
        self.wTD = nn.Parameter(torch.tensor(0.25))
        self.wA = nn.Parameter(torch.tensor(0.25))
        self.contrastive_head = contrastive_head(s.head, n, d, s.contr_dim, s.dropout, s.head_side)
        self.classification_head_from_contr = nn.Sequential(
            nn.Linear(s.contr_dim, s.contr_dim), nn.GELU(), nn.Linear(s.contr_dim, s.n_classes)
        )

    def _share(self, weight, level):
        """A contribution's factor: its learned weight over how many the level receives."""
        return weight / (3 if level == self.settings.levels - 1 else 4)

    def iterate(self, state, parts, keep, alike=False):
        """One iteration of the column loop, all four contributions from the old state.

        Args:
            state: list of K levels. Those that are kept and the one below them are read.
            parts: (d, B, n), what level 0 receives from the tokens, the same in every iteration.
            keep: how many of the highest levels are wanted. The head reads the top one alone, and
                a level depends on one more below it for each iteration that remains.
            alike: the columns of the state are all equal, as they are at first.

        Returns:
            The new state, with None for levels that are not kept.
        """
        top = len(state) - 1
        # The norm of equal columns passes no gradient on, but in floats rounding noise, large.
        source = [level.detach() for level in state] if alike else state
        new = [None] * len(state)
        for k in range(top + 1 - keep, top + 1):
            own = state[k]
            total = self.bottom_up(source[k - 1], k, self._share(self.wBU, k)) if k else parts
            if k < top:
                total = total + self.top_down(source[k + 1], k, self._share(self.wTD, k))
            total = torch.addcmul(total, own, self._share(self.wl, k))
            new[k] = torch.addcmul(total, self.attention(own), self._share(self.wA, k))
        return new

    def _loop(self, images, keeps, state=None):
        """The column loop over images.

        Args:
            keeps: how many of the highest levels to keep, for every iteration in turn.
            state: list of K levels to go on from; None for the initial one.

        Returns:
            The states before and after every iteration.
        """
        tokens = self.image_to_tokens(images.to(self.init_levels.dtype))  # (d, B, n)
        parts = self.bottom_up(tokens, 0, self._share(self.wBU, 0))
        iterate = self.iterate
        if self.settings.recompute:
            iterate = partial(
                checkpoint, self.iterate, use_reentrant=False, preserve_rng_state=False
            )
        initial = self.init_levels[:, :, None, None].expand(-1, -1, 1, tokens.shape[2])
        states = [list(initial) if state is None else state]
        for t, keep in enumerate(keeps):
            states.append(iterate(states[-1], parts, keep, alike=t == 0 and state is None))
        return states

    def states(self, images, iters=None, levels=None):
        """The state after every iteration, from which islands are drawn.

        Args:
            images: (B, n_channels, image_size, image_size).
            iters: number of iterations; None for that of the settings.
            levels: (B, n, K, d), a state to go on from instead of the initial one.

        Returns:
            (iters + 1, B, n, K, d), the state gone on from first.
        """
        keeps = [self.settings.levels] * (self.settings.n_iters if iters is None else iters)
        start = None if levels is None else list(levels.permute(2, 3, 0, 1))
        states = self._loop(images, keeps, start)
        return torch.stack([_columns(state, len(images)) for state in states])

    def forward(self, images):
        """images (B, n_channels, image_size, image_size) -> embedding (B, contr_dim), unit length.

        Levels that the state that feeds the head does not depend on are not computed.
        """
        last = self.settings.denoise_iter % (self.settings.n_iters + 1)
        keeps = [min(self.settings.levels, last - t) for t in range(last)]
        return self._embed(self._loop(images, keeps)[-1], len(images))

    def with_levels(self, images):
        """images -> the embedding, as `forward` returns it, and all levels of the last state,
        (B, n, K, d)."""
        states = self._loop(images, [self.settings.levels] * self.settings.n_iters)
        embedding = self._embed(states[self.settings.denoise_iter], len(images))
        return embedding, _columns(states[-1], len(images))

    def _embed(self, state, n_images):
        top = state[-1].expand(-1, n_images, -1).permute(1, 2, 0)  # (B, n, d)
        return F.normalize(self.contrastive_head(top), dim=-1)

    def classify(self, images):
        """images (B, n_channels, image_size, image_size) -> logits (B, n_classes)."""
        return self.classification_head_from_contr(self(images))

"""The convolutional tokenizers: from images to a grid of cells."""

import torch
import torch.nn.functional as F
from torch import nn

from agglomerator.util.distributed import BatchNorm2d


def convolution(c_in, c_out, stride=1):
    """3x3 convolution without bias, BatchNorm, ReLU: a list of three modules."""
    conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    if c_in == 1:
        # The stride of a dimension of size 1 says nothing, but DistributedDataParallel compares it
        # with that of the gradient, which is laid out channels last as the images are.
        conv.weight.data = conv.weight.data.clone(memory_format=torch.channels_last)
    return [conv, BatchNorm2d(c_out), nn.ReLU()]


def pooled(c_in, c_out, stride):
    """The same, with max pooling first, so that BatchNorm and ReLU see fewer cells."""
    conv, *others = convolution(c_in, c_out)
    return [conv, nn.MaxPool2d(stride, ceil_mode=True), *others]


class Residual(nn.Module):
    """Two convolutions whose result is added to their input (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            *convolution(channels, channels), *convolution(channels, channels)
        )

    def forward(self, x):
        return x + self.block(x)


class Pyramid(nn.Module):
    """A cell sees all of the image: features go down to coarser grids and come up again, each added
    to those of the finer grid (Ronneberger et al. 2015, arXiv 1505.04597; Lin et al. 2017, "Feature
    pyramid networks", arXiv 1612.03144).

    Args:
        channels: of the input; each coarser grid has twice as many, at most `MOST_CHANNELS`.
        depth: number of coarser grids.
    """

    MOST_CHANNELS = 128

    def __init__(self, channels, depth):
        super().__init__()
        widths = [min(channels * 2**i, max(channels, self.MOST_CHANNELS)) for i in range(depth + 1)]
        steps = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(
            nn.Sequential(*convolution(fine, coarse, 2), Residual(coarse)) for fine, coarse in steps
        )
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in steps)
        self.mix = nn.ModuleList(Residual(fine) for fine, _ in steps)

    def forward(self, x):
        grids = [x]
        for down in self.down:
            grids.append(down(grids[-1]))
        x = grids.pop()
        for finer, up, mix in zip(grids[::-1], self.up[::-1], self.mix[::-1], strict=True):
            coarse = F.interpolate(up(x), finer.shape[-2:], mode="bilinear", align_corners=False)
            x = mix(finer + coarse)
        return x


class Tokenizer(nn.Module):
    """Images (B, n_channels, image_size, image_size) -> cells (B, E, G, G).

    G is image_size / stride, rounded up; E = d / p^2. The setting `tokenizer` is one of
    convmlp: as published (ConvMLP, Li et al. 2021, arXiv 2109.04454), convolutions, then pooling;
    residual: two convolutions, pooling, residual blocks on the output grid, a convolution;
    vgg: convolutions on the grid of the image, on half and on a quarter of it, twice as wide on
        each (Simonyan and Zisserman 2015, arXiv 1409.1556);
    pyramid: two convolutions, then a `Pyramid` of coarser grids, of which the finest comes out.
    """

    def __init__(self, settings):
        super().__init__()
        s, kind, depth = settings, settings.tokenizer, settings.tokenizer_depth
        channels, width = s.token_channels, s.tokenizer_width or s.token_channels // 2
        stride, pool_stride = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[s.tokenizer_stride]
        pool = nn.MaxPool2d(3, pool_stride, padding=1)
        layers = convolution(s.n_channels, width, 1 if kind == "vgg" else stride)
        if kind == "convmlp":
            for _ in range(depth - 2):
                layers += convolution(width, width)
            layers += [*convolution(width, channels), pool]
        elif kind == "residual":
            layers += [*convolution(width, 2 * width), pool]
            layers += [Residual(2 * width) for _ in range(depth)]
            layers += convolution(2 * width, channels)
        elif kind == "pyramid":
            layers += [*convolution(width, width, pool_stride), Residual(width)]
            layers += [Pyramid(width, depth), nn.Conv2d(width, channels, 1)]
        else:
            layers += pooled(width, 2 * width, stride) + convolution(2 * width, 2 * width)
            layers += pooled(2 * width, 4 * width, pool_stride)
            for _ in range(depth - 1):
                layers += convolution(4 * width, 4 * width)
            layers += convolution(4 * width, channels)
        self.block = nn.Sequential(*layers)

    def forward(self, images):
        # Channels last: no conversion of layouts around each convolution. Images of one channel are
        # contiguous either way; only a copy says which is meant.
        return self.block(images.clone(memory_format=torch.channels_last))

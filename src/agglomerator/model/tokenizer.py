"""The convolutional tokenizers: from images to a grid of cells."""

import torch
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


class Tokenizer(nn.Module):
    """Images (B, n_channels, image_size, image_size) -> cells (B, E, G, G).

    G is image_size / stride, rounded up; E = d / p^2. The setting `tokenizer` is one of
    convmlp: as published (ConvMLP, Li et al. 2021, arXiv 2109.04454), convolutions, then pooling;
    residual: two convolutions, pooling, residual blocks on the output grid, a convolution;
    vgg: convolutions on the grid of the image, on half and on a quarter of it, twice as wide on
        each (Simonyan and Zisserman 2015, arXiv 1409.1556).
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

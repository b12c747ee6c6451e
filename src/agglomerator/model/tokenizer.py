"""The convolutional tokenizer."""

import torch
from torch import nn

from agglomerator.util.distributed import BatchNorm2d


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

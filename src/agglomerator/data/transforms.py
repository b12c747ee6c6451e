"""Fixed transforms of batches of uint8 images (B, C, H, W), C = 1 or 3, on the batch's device.

Random transforms are in `agglomerator.data.augment`. These are our own because torchvision pads
images that are too small for a crop, rounds gray otherwise than Pillow, and normalises in one more
pass over the batch. No function changes its input.
"""

from functools import lru_cache

import torch

from agglomerator.util.precision import in_float32


def center_crop(images, size):
    """Cut out the middle of each image.

    Args:
        images: (B, C, H, W), any dtype.
        size: side of the window, or (height, width).

    Returns:
        (B, C, height, width).

    Raises:
        ValueError: the window is larger than the image.

    Example:
        >>> import torch
        >>> center_crop(torch.arange(16).view(1, 1, 4, 4), 2)
        tensor([[[[ 5,  6],
                  [ 9, 10]]]])
    """
    height, width = window_size(images, size)
    top, left = (images.shape[-2] - height) / 2, (images.shape[-1] - width) / 2
    top, left = round(top), round(left)
    return images[..., top : top + height, left : left + width]


@in_float32
def normalize(images, mean, std):
    """Normalise images: (x / 255 - mean) / std.

    Args:
        images: (B, C, H, W) uint8.
        mean, std: numbers, or one number for each channel, on the scale 0 to 1.

    Returns:
        (B, C, H, W) float32.

    Raises:
        TypeError: images are not uint8.
        ValueError: images have another shape.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), 0.5, 0.5)
        tensor([[[[-1.0000, -0.6000,  1.0000]]]])
    """
    check_images(images)
    mean, std = _of_channels(mean, images.device), _of_channels(std, images.device)
    scale, shift = 1 / (255 * std), mean / std
    return images.float().mul_(scale).sub_(shift)


def denormalize(views, mean, std):
    """Undo `normalize`, up to the scale: (B, C, H, W) float32 -> colours from 0 to 1."""
    mean, std = (_of_channels(x, views.device) for x in (mean, std))
    return views * std + mean


def _of_channels(numbers, device):
    numbers = torch.as_tensor(numbers, dtype=torch.float32).flatten().tolist()
    return _made_once(tuple(numbers), device)


@lru_cache
def _made_once(numbers, device):
    """Numbers (C, 1, 1) on a device, to which nothing is sent again."""
    return send(torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1), device)


def to_channels(images, n_channels):
    """Repeat gray images to 3 channels, or make colour images gray by Pillow's ITU-R 601 weights.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        n_channels: 1 or 3.

    Returns:
        (B, n_channels, H, W) uint8; the same tensor if C is n_channels.

    Raises:
        TypeError: images are not uint8.
        ValueError: another number of channels.

    Example:
        >>> import torch
        >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        >>> to_channels(red, 1).item()
        76
    """
    check_images(images)
    if n_channels not in (1, 3):
        raise ValueError(f"n_channels must be 1 or 3, not {n_channels}")
    if images.shape[1] == n_channels:
        return images
    if n_channels == 3:
        return images.repeat(1, 3, 1, 1)
    red, green, blue = images.int().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)


def send(tensor, device):
    """Copy a tensor from the CPU to a device. The program does not wait for the device, except for
    an Apple GPU, where that is not safe."""
    return tensor.to(device, non_blocking=device.type != "mps")


def window_size(images, size):
    """(height, width) of a window in images (B, C, H, W); `size` is its side or both.

    Raises:
        ValueError: the window is larger than the images, or empty.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not (0 < height <= images.shape[-2] and 0 < width <= images.shape[-1]):
        full_height, full_width = images.shape[-2:]
        raise ValueError(f"no {height}x{width} window in images of {full_height}x{full_width}")
    return height, width


def check_images(images):
    """Raise TypeError if images are not uint8, ValueError if they are not (B, 1 or 3, H, W)."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, H, W), not {tuple(images.shape)}")

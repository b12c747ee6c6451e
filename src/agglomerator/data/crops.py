"""Random crops and colours of whole batches, for photographs: views as in SimCLR (Chen et al. 2020,
arXiv 2002.05709), but with all of an image in reach: beyond its border it is mirrored.

As in `augment`, every image draws its own parameters, from a generator on the CPU.
"""

import torch
import torch.nn.functional as F

from agglomerator.data.transforms import check_images, send
from agglomerator.util.precision import in_float32

ROTATION = 0.15  # radians
STRETCH = 0.15  # of the logarithm of width by height
CONTRAST, SATURATION = 0.3, 0.4  # of the logarithms of factors
TINT, SHIFT = 0.12, 0.12  # of the logarithm of a factor for each channel, and of what is added


def random_views(images, generator):
    """Crops of random place, size and shape, half of them mirrored, in random colours.

    Args:
        images: (B, C, H, W) uint8.
        generator: torch.Generator on the CPU.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        TypeError: images are not uint8.
        ValueError: images have another shape.
    """
    return labelled_views(images, None, generator)[0]


@in_float32
def labelled_views(images, labels, generator):
    """The same, of images whose places are labelled.

    Args:
        images: (B, C, H, W) uint8.
        labels: (B, L, S, S) integers, L labels for each place of a grid; or None.
        generator: torch.Generator on the CPU.

    Returns:
        Views (B, C, H, W) uint8, and their labels (B, L, S, S), or None.
    """
    check_images(images)
    places = send(random_places(len(images), generator, (0.7, 1.1), 0.15), images.device)
    colours = random_colours(crop(images.float() / 255, places), generator)
    if labels is not None:
        labels = crop(labels.float(), places, "nearest").long()
    return to_bytes(colours), labels


@in_float32
def random_affine(images, generator):
    """Turn, resize, stretch and shift images a little, and mirror none: for writing.

    Args:
        images: (B, C, H, W) uint8.
        generator: torch.Generator on the CPU.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        TypeError: images are not uint8.
        ValueError: images have another shape.
    """
    check_images(images)
    places = random_places(len(images), generator, (0.85, 1.15), 0.15, mirrors=False)
    return to_bytes(crop(images.float() / 255, send(places, images.device)))


@in_float32
def random_crops(colours, generator, sides, shift):
    """Crop images at random places, resize the crops, and mirror half of them.

    Args:
        colours: (B, C, H, W) from 0 to 1.
        generator: torch.Generator on the CPU.
        sides: least and greatest side of a crop, as a share of the image's.
        shift: how far a crop's middle may be from the image's, as a share of half a side.

    Returns:
        (B, C, H, W).
    """
    places = random_places(len(colours), generator, sides, shift)
    return crop(colours, send(places, colours.device))


def random_places(n, generator, sides, shift, mirrors=True):
    """Where n random crops lie, half of them mirrored if `mirrors`: affine maps (n, 2, 3) for
    `F.affine_grid`, on the CPU."""
    draws = torch.rand(6, n, generator=generator)
    scale = sides[0] + (sides[1] - sides[0]) * draws[0]
    angle, stretch, right, down = draws[1:5] * 2 - 1
    angle, stretch = ROTATION * angle, (STRETCH * stretch).exp()
    mirror = torch.where(draws[5] < 0.5 * mirrors, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    across = torch.stack((mirror * cos * stretch, -sin * stretch, shift * right), 1)
    along = torch.stack((mirror * sin / stretch, cos / stretch, shift * down), 1)
    return torch.stack((across, along), 1)


def crop(values, places, mode="bilinear"):
    """The parts of values (B, C, H, W) that lie at places (B, 2, 3), in the same size."""
    grid = F.affine_grid(places, list(values.shape), align_corners=False)
    return F.grid_sample(values, grid, mode, padding_mode="reflection", align_corners=False)


@in_float32
def random_colours(colours, generator, strength=1.0):
    """Change contrast, saturation, tint and brightness: (B, C, H, W) from 0 to 1 -> the same."""
    n, c = colours.shape[:2]
    draws = torch.rand(n, 2 + 2 * c, 1, 1, generator=generator) * 2 - 1
    draws = send(strength * draws, colours.device)
    mean = colours.mean((1, 2, 3), keepdim=True)
    colours = mean + (colours - mean) * (CONTRAST * draws[:, :1]).exp()
    gray = colours.mean(1, keepdim=True)
    less = SATURATION * (draws[:, 1:2] - strength / 4)
    colours = gray + (colours - gray) * less.exp()
    colours = colours * (TINT * draws[:, 2 : 2 + c]).exp() + SHIFT * draws[:, 2 + c :]
    return colours.clamp(0, 1)


def to_bytes(colours):
    """Colours from 0 to 1 -> uint8."""
    return (colours * 255).round().clamp(0, 255).to(torch.uint8)

"""Augmentation of whole batches of uint8 images (B, C, H, W), C = 1 or 3, on the batch's device.

Every image draws its own parameters. torchvision draws one set for a batch, and its `RandAugment`
takes some twenty times as long image by image, which is why this is our own (512 images of 32x32
on one CPU thread: 99 ms against 4).

All draws come from a generator on the CPU, and their order depends only on the batch size. So a
result is a function of the images and the generator's seed, the same on every device and in every
precision. Two views of a batch are two calls. No function changes its input.

    views = normalize(random_erasing(rand_augment(batch, generator), generator), mean, std)
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torchvision.transforms import functional as tvf

from agglomerator.data.transforms import check_images, send, window_size
from agglomerator.util.precision import in_float32

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
SIGNED = OPERATIONS[1:10]  # their magnitude takes either sign
NUM_MAGNITUDES = 31


@in_float32
def rand_augment(images, generator, num_ops=2, magnitude=9):
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719) with the operations and magnitudes of
    `torchvision.transforms.RandAugment`, nearest interpolation, fill 0.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        generator: torch.Generator on the CPU.
        num_ops: how many operations each image draws; they are applied one after another.
        magnitude: strength of all operations, 0 to 30.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        TypeError: images are not uint8.
        ValueError: images have another shape, or magnitude is out of range.

    Example:
        >>> import torch
        >>> images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        >>> rand_augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """
    operations = torch.randint(len(OPERATIONS), (num_ops, len(images)), generator=generator)
    negative = torch.randint(2, (num_ops, len(images)), generator=generator)
    for step in range(num_ops):
        images = apply_operations(images, operations[step], negative[step], magnitude)
    return images


@in_float32
def apply_operations(images, operations, negative, magnitude=9):
    """Apply to each image its own operation of RandAugment.

    Args:
        images: (B, C, H, W) uint8, C = 1 or 3.
        operations: (B,) int64 on the CPU, indices into OPERATIONS.
        negative: (B,) int64 on the CPU, 1 where a SIGNED operation takes the negative magnitude.
        magnitude: strength of all operations, 0 to 30.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        TypeError: images are not uint8.
        ValueError: images have another shape, or magnitude is out of range.
    """
    check_images(images)
    if not 0 <= magnitude < NUM_MAGNITUDES:
        raise ValueError(f"magnitude must be 0 to {NUM_MAGNITUDES - 1}, not {magnitude}")
    values = operation_values(magnitude, *images.shape[-2:])
    # Sorted by operation and sign, the batch falls into at most 28 slices, each with one formula.
    kinds = 2 * operations + negative
    order = kinds.argsort()
    counts = kinds.bincount(minlength=2 * len(OPERATIONS)).tolist()
    order = send(order, images.device)
    batch = images.index_select(0, order)
    for kind, part in enumerate(batch.split(counts)):
        name = OPERATIONS[kind // 2]
        if len(part) == 0 or name == "Identity":
            continue
        value = -values[name] if kind % 2 and name in SIGNED else values[name]
        if name in GEOMETRIC:
            part.copy_(_warp(part, name, value))
        elif name in TABLES:
            part.copy_(_look_up(part, TABLES[name](part, value)))
        else:
            part.copy_(BLENDS[name](part, value))
    return batch.index_select(0, order.argsort())


@lru_cache
def operation_values(magnitude, height, width):
    """The value of each operation at a magnitude of 0 to 30, a dictionary by name.

    Slopes for shears, pixels for translations, degrees for Rotate; what Brightness, Color, Contrast
    and Sharpness add to a factor of 1; the bits that Posterize keeps; the least value that Solarize
    inverts.
    """
    highest = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
        "Brightness": 0.9,
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
    }
    values = dict.fromkeys(OPERATIONS, 0.0)
    for name, high in highest.items():
        values[name] = _steps(0, high)[magnitude].item()
    values["Posterize"] = 8 - round(magnitude * 4 / (NUM_MAGNITUDES - 1))
    values["Solarize"] = _steps(255, 0)[magnitude].item()
    return values


def _steps(first, last):
    return torch.linspace(first, last, NUM_MAGNITUDES, dtype=torch.float32)


@lru_cache
def _pixel_map(name, value, height, width, device):
    """The source of each pixel of a warped image: its index, (H*W,) int64, and whether it lies in
    the image, (H*W,) uint8."""
    # torchvision warps an image of pixel indices, so we pick the same pixels as torchvision. Rows
    # and columns are separate, since float32 counts no further than 2^24, and begin at 1.
    rows, columns = torch.arange(1.0, height + 1), torch.arange(1.0, width + 1)
    numbers = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    if name == "Rotate":
        warped = tvf.rotate(numbers, value)
    else:
        slope = math.degrees(math.atan(value))
        shear = {"ShearX": [slope, 0.0], "ShearY": [0.0, slope]}.get(name, [0.0, 0.0])
        shift = {"TranslateX": [int(value), 0], "TranslateY": [0, int(value)]}.get(name, [0, 0])
        center = [0, 0] if name in ("ShearX", "ShearY") else None
        warped = tvf.affine(numbers, 0.0, shift, 1.0, shear, center=center)
    row, column = warped.flatten(1).long() - 1  # -1 outside
    source = row.clamp(min=0) * width + column.clamp(min=0)
    return send(source, device), send((row >= 0).to(torch.uint8), device)


def _warp(images, name, value):
    source, inside = _pixel_map(name, value, *images.shape[-2:], images.device)
    pixels = images.flatten(2)  # (n, C, H*W)
    return pixels.gather(2, source.expand_as(pixels)).mul_(inside).view_as(images)


def _look_up(images, table):
    """Replace every pixel value by its entry in a table that broadcasts to (n, C, 256)."""
    pixels = images.flatten(2)
    return table.expand(*pixels.shape[:2], 256).gather(2, pixels.long()).view_as(images)


def _ramp(images):
    return torch.arange(256, dtype=torch.float32, device=images.device)


def _to_uint8(values):
    # On a CPU, two conversions are several times faster than one from float to uint8.
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def _blend(values, base, factor):
    return _to_uint8(values * factor + base * (1 - factor))


def _gray(images):
    """Luminance, rounded down as torchvision does: (n, 1 or 3, H, W) -> (n, 1, H, W) float32."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, dim=1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114).floor_()


def _brightness_table(images, value):
    return _to_uint8(_ramp(images) * (1 + value))


def _contrast_table(images, value):
    mean = _gray(images).mean(dim=(1, 2, 3)).view(-1, 1, 1)
    return _blend(_ramp(images), mean, 1 + value)  # (n, 1, 256)


def _posterize_table(images, bits):
    return _ramp(images).to(torch.uint8).bitwise_and_(256 - 2 ** (8 - bits))


def _solarize_table(images, threshold):
    ramp = _ramp(images)
    return torch.where(ramp >= threshold, 255 - ramp, ramp).to(torch.uint8)


def _autocontrast_table(images, _):
    low, high = images.flatten(2).amin(2, True).float(), images.flatten(2).amax(2, True).float()
    flat = low == high
    scale = (255 / (high - low)).masked_fill_(flat, 1)
    return _to_uint8((_ramp(images) - low.masked_fill_(flat, 0)) * scale)  # (n, C, 256)


def _equalize_table(images, _):
    pixels = images.flatten(2).long()
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=torch.int32))
    of_highest = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_highest) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    return torch.where(step > 0, table, _ramp(images).int()).to(torch.uint8)  # (n, C, 256)


def _color(images, value):
    return images if images.shape[1] == 1 else _blend(images, _gray(images), 1 + value)


def _sharpness(images, value):
    if min(images.shape[-2:]) < 3:
        return images
    values = images.float()
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    smooth = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    smooth.add_(values[..., 1:-1, 1:-1], alpha=4).mul_(1 / 13).round_()
    base = values.clone()
    base[..., 1:-1, 1:-1] = smooth
    return _blend(values, base, 1 + value)


GEOMETRIC = OPERATIONS[1:6]
TABLES = {
    "Brightness": _brightness_table,
    "Contrast": _contrast_table,
    "Posterize": _posterize_table,
    "Solarize": _solarize_table,
    "AutoContrast": _autocontrast_table,
    "Equalize": _equalize_table,
}
BLENDS = {"Color": _color, "Sharpness": _sharpness}


@in_float32
def random_crop(images, size, generator, padding=0):
    """Cut a window of its own from each image. All positions are equally likely.

    Args:
        images: (B, C, H, W), any dtype.
        size: side of the window, or (height, width).
        generator: torch.Generator on the CPU.
        padding: how many zeros to put on every side of the images first.

    Returns:
        (B, C, height, width).

    Raises:
        ValueError: the window is larger than the padded image.
    """
    if padding:
        images = F.pad(images, (padding,) * 4)
    height, width = window_size(images, size)
    full_height, full_width = images.shape[-2:]
    # Uniform real numbers, so that the draws do not depend on the sizes.
    position = torch.rand(2, len(images), 1, 1, generator=generator)
    top = (position[0] * (full_height - height + 1)).long()
    left = (position[1] * (full_width - width + 1)).long()
    first = send(top * full_width + left, images.device)  # (B, 1, 1)
    rows = torch.arange(height, device=images.device).view(-1, 1) * full_width
    source = first + rows + torch.arange(width, device=images.device)  # (B, height, width)
    pixels = images.flatten(2)
    source = source.flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1)
    return pixels.gather(2, source).view(*images.shape[:2], height, width)


@in_float32
def random_horizontal_flip(images, generator, p=0.5):
    """Mirror each image of (B, C, H, W) left to right, with probability p."""
    flipped = torch.rand(len(images), generator=generator) < p
    flipped = send(flipped.view(-1, 1, 1, 1), images.device)
    return images.flip(-1).where(flipped, images)


@in_float32
def random_erasing(images, generator, p=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=0):
    """Random Erasing (Zhong et al. 2017, arXiv 1708.04896): overwrite a rectangle of its own in
    each image, drawn as `torchvision.transforms.RandomErasing` draws it.

    Args:
        images: (B, C, H, W) uint8 or float.
        generator: torch.Generator on the CPU.
        p: probability that an image gets a rectangle.
        scale: least and greatest area, as a share of the image.
        ratio: least and greatest height / width.
        value: what to write: a number, or a number for each channel.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    batch, (height, width), device = len(images), images.shape[-2:], images.device
    chosen = torch.rand(batch, generator=generator) < p
    # Ten tries: the first that fits into the image counts.
    area = torch.empty(batch, 10).uniform_(*scale, generator=generator) * (height * width)
    aspect = torch.empty(batch, 10).uniform_(*map(math.log, ratio), generator=generator).exp()
    position = torch.rand(2, batch, generator=generator)
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(1, keepdim=True)
    chosen &= fits.any(1)
    erased_height = heights.gather(1, first).flatten() * chosen
    erased_width = widths.gather(1, first).flatten() * chosen
    top = (position[0] * (height - erased_height + 1)).floor()
    left = (position[1] * (width - erased_width + 1)).floor()
    box = send(torch.stack((top, top + erased_height, left, left + erased_width)), device)
    box = box.view(4, batch, 1, 1)
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    row = row.view(-1, 1)
    inside = (row >= box[0]) & (row < box[1]) & (column >= box[2]) & (column < box[3])
    inside = inside.unsqueeze(1).to(images.dtype)  # (B, 1, H, W)
    value = send(torch.as_tensor(value, dtype=images.dtype).view(-1, 1, 1), device)
    return (images * (1 - inside)).add_(inside * value)

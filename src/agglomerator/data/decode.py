"""Image files of any kind -> 8-bit pixels.

torchvision reads what Pillow's defaults make of a file. They get 16 bits, floats and transparency
wrong, and leave a picture on its side. That is why this is our own.
"""

import logging
import os
import sys
import warnings
from functools import lru_cache

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from agglomerator.util.errors import UserError

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it also raises what it logs
Image.MAX_IMAGE_PIXELS = 2**25  # Pillow refuses images of twice as many
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
MOST_TEXT = 2**26  # bytes of text in a PNG, which is not used
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and one of its values
# Pillow keeps the upper bytes of 16-bit colours. Another raw mode makes it read the lower ones.
LOWER = {f"{mode};16{end}": f"{mode};16{other}" for mode in ("RGB", "RGBA")
         for end, other in ("BL", "LB", "NB" if sys.byteorder == "little" else "NL")}  # fmt: skip
LOWER["LA;16B"] = "RGBA"  # upper and lower bytes of gray and alpha


class UnreadableImage(UserError):
    """An image file cannot be read.

    The message is one line, even if PyTorch brings it from a worker process and puts the traceback
    of that process in front.
    """

    def __init__(self, message):
        super().__init__(message.strip().rsplit("UnreadableImage: ", 1)[-1])


def read_image(path, size, n_channels):
    """Read an image file of any format, mode and size that Pillow knows, except PostScript.

    It is turned upright as its EXIF orientation says. Transparent pixels are put over white. The
    middle square is cut out and resized. Of an animation, the first frame counts. Values of more
    than 8 bits are scaled by `to_8_bits`.

    Returns:
        (n_channels, size, size) uint8.

    Raises:
        UnreadableImage: the file cannot be read.
    """
    try:
        # Given a path, Pillow maps some files into memory, and scrambles those to be turned.
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            image.draft(None, (2 * size, 2 * size))  # large JPEGs need not be decoded in full
            return _square(of_8_bits(image, file), size, n_channels)
    except Exception as error:  # damaged files raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is not known here" if unknown else " ".join(str(error).split())
        raise UnreadableImage(
            f"{path}: cannot be read as an image ({reason}); {_way_out(error)}, or leave out such "
            "files by --skip_unreadable."
        ) from None


def upright_size(path):
    """(width, height) of an image file as `read_image` turns it, before it takes the middle.

    Raises:
        UnreadableImage: the file cannot be read.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
            # Of a TIFF, Pillow has turned the size already.
            lies = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size[::-1] if lies else image.size
    except Exception as error:  # damaged files raise anything
        raise UnreadableImage(f"{path}: cannot be read as an image ({error}).") from None


def read_photograph(path, least, most, n_channels):
    """Read an image file, or take a Pillow image, as `read_image` does, but the middle square at
    its own resolution: of at least `least` and at most `most` pixels a side.

    Raises:
        UnreadableImage: the file cannot be read.
    """
    if isinstance(path, Image.Image):
        return pixels_of(path, min(max(min(path.size), least), most), n_channels)
    path = os.fsdecode(path)
    try:
        with Image.open(path, formats=formats()) as image:
            side = min(image.size)
    except Exception:  # read_image tells why
        side = least
    return read_image(path, min(max(side, least), most), n_channels)


def pixels_of(image, size, n_channels):
    """A Pillow image of any mode and size, as `read_image` would return it."""
    return _square(of_8_bits(image.copy()), size, n_channels)


def _square(image, size, n_channels):
    ImageOps.exif_transpose(image, in_place=True)
    image = _in_mode(image, "L" if n_channels == 1 else "RGB")
    pixels = np.array(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.reshape(size, size, n_channels).transpose(2, 0, 1).copy())


def _way_out(error):
    if isinstance(error, Image.DecompressionBombError):
        return "make it smaller"
    if "MAX_TEXT" in str(error):
        return "save it without the text that it carries"
    return "convert it, as to PNG, remove it"


@lru_cache
def formats():
    """Formats to read: all except EPS, which is a program that Ghostscript would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _in_mode(image, mode):
    """Convert an image of any mode of 8 bits to L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # the only mode that Pillow converts it to
    return image.convert(mode)


def to_8_bits(values, bits=None):
    """Scale values of any range to bytes.

    Floats that all lie below 2 are on the scale 0 to 1. Of other values the upper 8 of `bits` bits
    are kept. Few formats tell the number of bits. If it is not known, it is the least of 8, 10, 12,
    14 and 16 that holds the greatest value, or as many as that value needs. So 12 bits of a camera
    in a 16-bit file come out right, but a very dark image loses its brightness. Negative values,
    infinities and NaN come out black.

    Args:
        values: array of numbers.
        bits: of a value, if known; 0 for floats on the scale 0 to 1.

    Returns:
        uint8 array of the same shape.

    Raises:
        ValueError: no value is finite.

    Example:
        >>> import numpy as np
        >>> to_8_bits(np.array([0, 2048, 4095])).tolist()  # 12 bits
        [0, 128, 255]
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("it holds no finite value")
    values = np.where(finite, values, 0)
    bits = _bits_of(values) if bits is None else bits
    values = values / 2.0 ** (bits - 8) if bits else values * 255
    return np.clip(values, 0, 255).astype(np.uint8)


def _bits_of(values):
    """The least usual number of bits that holds finite values; 0 for floats on the scale 0 to 1."""
    greatest = int(values.max())
    if values.dtype.kind == "f" and greatest < 2:
        return 0
    return next((n for n in (8, 10, 12, 14, 16) if greatest < 2**n), greatest.bit_length())


def of_8_bits(image, file=None, bits=None):
    """Convert an image of an open file to 8 bits. Returns it unchanged if it has no more.

    Args:
        image: of Pillow.
        file: of the image, open. It may be missing where an image is not of 16-bit colours.
        bits: of a value, as `bits_of` returns them; None for those that the image shows.
    """
    raw, clear = _raw_mode(image), image.info.get("transparency")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if not _is_deep(image, raw):
        if raw in ("L;2", "L;4") and clear is not None:  # Pillow scales the pixels, but not this
            image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[raw]
        return image
    if raw in LOWER and clear is None and np.asarray(image)[..., :3].max() >= 2**6:
        return image  # it uses all 16 bits, and Pillow has kept the upper 8
    values, alpha, known = _deep_values(image, file, raw)
    pixels = to_8_bits(values, bits if known is None else known)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if clear is not None:
        alpha = np.where((values == clear).all(-1, keepdims=True), 0, 255).astype(np.uint8)
    pixels = np.concatenate([pixels, alpha], -1)
    converted = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    converted.info = {name: x for name, x in image.info.items() if name != "transparency"}
    return converted


def bits_of(image, file):
    """How many bits a value of an image of an open file has, as `of_8_bits` takes it: 8 or more; 0
    for floats on the scale 0 to 1."""
    raw = _raw_mode(image)
    if not _is_deep(image, raw):
        return 8
    values, _, known = _deep_values(image, file, raw)
    return _bits_of(np.where(np.isfinite(values), values, 0)) if known is None else known


def _is_deep(image, raw):
    """Whether an image has more than 8 bits; `raw` is its `_raw_mode`."""
    return raw in LOWER or image.mode == "F" or image.mode.startswith("I")


def _deep_values(image, file, raw):
    """Values (H, W, C) of an image of more than 8 bits, its transparency (H, W, 0 or 1) uint8, and
    the number of bits, None if the file does not tell."""
    image.load()  # turns a TIFF upright, which changes its shape
    if raw in LOWER:
        upper = np.asarray(image)
        return _both_bytes(upper[..., :3], file, LOWER[raw]), upper[..., 3:], None
    values, bits = np.asarray(image)[..., None], None
    if raw == "I;32N":
        values = values.view(np.uint32)  # as in the file
    if image.mode != "F" and image.format in ("PPM", "JPEG2000"):
        bits = 16  # Pillow has scaled the range that the file names
    elif raw == "I;12":
        bits = 12
    return values, values[..., 1:].astype(np.uint8), bits


def _raw_mode(image):
    """Pillow's name for the storage of values in an opened file."""
    tile = getattr(image, "tile", None)  # of a file that is not read yet
    args = tile[0].args if tile else None
    return args[0] if isinstance(args, tuple) and args else args


def _both_bytes(upper, file, lower):
    """Colours of 16 bits, from their upper bytes (H, W, 3) and the raw mode of their lower ones."""
    file.seek(0)
    with Image.open(file, formats=("PNG", "TIFF")) as image:
        image.tile = [
            tile._replace(args=(lower, *tile.args[1:]) if isinstance(tile.args, tuple) else lower)
            for tile in image.tile
        ]
        image.load()
        pixels = np.asarray(image)
    lower_bytes = pixels[..., 1:2] if lower == "RGBA" else pixels[..., :3]
    return upper * np.uint16(256) + lower_bytes

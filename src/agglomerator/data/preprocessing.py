"""From images as users have them to what a network was trained on."""

import os
import warnings

import numpy as np
import torch
from PIL import Image

from agglomerator.data import registry
from agglomerator.data.decode import pixels_of, read_image
from agglomerator.data.images import photographs
from agglomerator.data.transforms import center_crop, normalize
from agglomerator.util.errors import UserError

MARGIN = 0.05  # tolerance of the check of the range of normalised values


class Preprocessing:
    """Prepares images as the test set is prepared: takes the middle square, resizes it, converts
    it to the network's channels, and normalises it as in training.

    A network has it as `model.preprocess`.

    Args:
        settings: of the network. `normalization`, or else `dataset`, decides mean and standard
            deviation.

    Attributes:
        mean, std: of the channels on the scale 0 to 1, tuples.

    Example:
        >>> import numpy as np
        >>> from agglomerator.config import Settings
        >>> preprocess = Preprocessing(Settings(dataset="CIFAR10", image_size=32))
        >>> preprocess(np.zeros((100, 60, 3), dtype=np.uint8)).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, settings):
        self.settings = settings
        self.size, self.n_channels = settings.image_size, settings.n_channels
        self.side = registry.side_of(settings)
        self.mean, self.std = registry.normalization_of(settings)

    def __call__(self, images):
        """Make the network's input.

        Args:
            images: an image, a list of images, or a batch. An image is the path of a file, a Pillow
                image, or uint8 values from 0 to 255: an array (H, W) or (H, W, C), or a tensor
                (C, H, W), of any size. A batch is an array (B, H, W, C) or a tensor (B, C, H, W);
                C is 1, 3 or 4.

        Returns:
            (B, n_channels, image_size, image_size) float32, on the CPU.

        Raises:
            UserError: `images` is none of these.
            UnreadableImage: a file cannot be read as an image.
        """
        each = each_image(images, self.n_channels == 1)
        pixels = torch.stack([self._pixels(image) for image in each])
        return normalize(center_crop(pixels, self.size), self.mean, self.std)

    def photographs(self, images):
        """The same images as people have them, to draw what a network sees in them.

        Args:
            images: as for a call.

        Returns:
            A list of B tensors (n_channels, H, H) uint8: what the network sees of an image, at the
            image's own resolution, from image_size to 256 pixels a side.
        """
        each = each_image(images, self.n_channels == 1)
        return photographs(each, self.settings, self.side / self.size)

    def _pixels(self, image):
        if isinstance(image, str | os.PathLike):
            return read_image(os.fspath(image), self.side, self.n_channels)
        return pixels_of(image, self.side, self.n_channels)

    def warn(self, module, inputs):
        """Forward pre-hook: warn if the input cannot have been normalised as in training."""
        if torch.compiler.is_compiling():
            return
        low = min((0 - m) / s for m, s in zip(self.mean, self.std, strict=True))
        high = max((1 - m) / s for m, s in zip(self.mean, self.std, strict=True))
        least, greatest = inputs[0].min().item(), inputs[0].max().item()
        outside = least < low - MARGIN or greatest > high + MARGIN
        if outside or (0 <= least < 0.1 and 0.9 < greatest <= 1):
            warnings.warn(
                f"images with values from {least:.3g} to {greatest:.3g}, but this network was "
                f"trained on {low:.3g} to {high:.3g}: use model(model.preprocess(images)).",
                stacklevel=2,
            )


def each_image(images, gray=False):
    """A list of Pillow images or paths, from one image, a list of images, or a batch. For a `gray`
    network a tensor (3, H, W) is refused: it may be three gray images."""
    if isinstance(images, Image.Image):
        return [_file_of(images) or images]
    if isinstance(images, str | os.PathLike):
        return [images]
    if isinstance(images, list | tuple) and images:
        return [one for image in images for one in each_image(image)]
    is_tensor = isinstance(images, torch.Tensor)
    array = images.detach().cpu().numpy() if is_tensor else np.asarray(images)
    if not array.size or array.ndim < 2:
        raise UserError(
            "preprocess: takes an image or a list of them, as files, Pillow images, or uint8, "
            f"not {type(images).__name__} {str(images)[:40]}."
        )
    if array.dtype != np.uint8:
        raise UserError(
            f"preprocess: takes images of uint8, from 0 to 255, not {array.dtype} "
            f"{array.shape}; convert values from 0 to 1: (255 * images).round().astype('uint8')."
        )
    if array.ndim == 2:
        return [Image.fromarray(array)]
    channels = -3 if is_tensor else -1
    unclear = gray and is_tensor and array.ndim == 3 and array.shape[0] > 1
    if array.ndim not in (3, 4) or array.shape[channels] not in (1, 3, 4) or unclear:
        add = "[:, None]" if is_tensor else "[..., None]"
        raise UserError(
            f"preprocess: takes tensors (B, C, H, W) and arrays (B, H, W, C), not {array.shape}; "
            f"a batch of gray images needs its channel, images{add}, a colour image images[None]."
        )
    array = np.moveaxis(array, channels, -1)
    batch = array[None] if array.ndim == 3 else array
    batch = batch[..., 0] if batch.shape[-1] == 1 else batch
    return [Image.fromarray(np.ascontiguousarray(image)) for image in batch]


def _file_of(image):
    """The file of a Pillow image that was opened and not read yet, or None. The file tells how many
    bits a value has, which the image does not."""
    unread = getattr(image, "tile", None) and image.tell() == 0
    path = getattr(image, "filename", None) if unread else None
    return path if path and os.path.isfile(path) else None

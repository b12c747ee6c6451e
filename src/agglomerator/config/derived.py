"""What follows from other flags where the user gives none of its own.

Imports neither absl nor PyTorch, so that reading flags is quick.
"""

import math

# Side and channels of the images of data sets; others have those of the flags' defaults.
IMAGES = {
    "MNIST": (28, 3),
    "FashionMNIST": (28, 1),
    "smallNORB": (32, 1),
    "IMAGENET": (256, 3),
    "digits": (16, 1),
}


def derive(values, given):
    """Complete the flags: size and channels of the images follow from the data set, the grid from
    the size, the length of the schedule from that of the training, the head from the pre-training.

    Args:
        values: of all flags, by name.
        given: names of those that the user gave.

    Returns:
        A dictionary like `values`.

    Example:
        >>> values = {"dataset": "MNIST", "image_size": 32, "n_channels": 3, "conv_image_size": 8}
        >>> derive(values, given={"dataset"})["conv_image_size"]
        7
    """
    follows = dict(values)
    follows["image_size"], follows["n_channels"] = IMAGES.get(
        values["dataset"], (values["image_size"], values["n_channels"])
    )
    size = values["image_size"] if "image_size" in given else follows["image_size"]
    follows["conv_image_size"] = math.ceil(size / 4)  # of the published tokenizer
    if values.get("pretraining") == "masked":
        follows["head"] = "mean"
    if "max_epochs" in given:
        follows["lr_speed"] = values["max_epochs"]
    follows |= {name: values[name] for name in given}
    typed = getattr(given, "typed", given)
    if "island_threshold" in typed and "island_loss" not in typed:  # that is a flagfile's
        follows["island_loss"] = None
    return follows


def stride_of(image_size, conv_image_size):
    """The tokenizer's stride, pixels per cell of the grid along a side: 4, 2 or 1; None if no
    stride makes this grid."""
    strides = (s for s in (4, 2, 1) if math.ceil(image_size / s) == conv_image_size)
    return next(strides, None)

"""Colours for the vectors of a level, the same in all pictures of a run."""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import lab2rgb

from agglomerator.util.files import written_whole

LEAST_SPREAD = 0.1  # unit vectors that are closer than this get colours that hardly differ
LIGHTNESS, RED_GREEN, BLUE_YELLOW = (28, 92), (-45, 45), (-55, 55)  # ranges of CIELAB


class Projection:
    """A map from the vectors of each level to colours. It is fitted once and serves all pictures.

    Only the direction of a vector counts, as in consensus. The first principal axis of the vectors
    that it is fitted to runs from dark to light, the second from blue to yellow, the third from
    green to red: who cannot tell red from green misses the least. Equal vectors have equal colours
    in all images and at all times. Different vectors can have like colours, since three axes do not
    show all of their differences.

    Args:
        mean: (K, 1, d), of the unit vectors.
        axes: (K, d, 3), the principal axes.
        half: (K, 1, 3), half the range of each axis that colours show.

    Example:
        >>> import torch
        >>> states = torch.randn(6, 16, 2, 8)  # 6 images, 4 x 4 columns, 2 levels, width 8
        >>> Projection.fit(states).colours(states).shape
        (6, 2, 4, 4, 3)
    """

    def __init__(self, mean, axes, half):
        self.mean, self.axes, self.half = mean, axes, half

    @classmethod
    def fit(cls, states):
        """The projection for states (B, n, K, d).

        All levels at once, in torch: scikit-learn's PCA would take them one at a time, and has no
        range that leaves out the outermost 2 %.
        """
        vectors = F.normalize(states.nan_to_num().double(), dim=-1)
        vectors = vectors.flatten(0, 1).transpose(0, 1)  # (K, B*n, d)
        mean = vectors.mean(1, keepdim=True)
        axes = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[:, :3].mT  # (K, d, 3)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = F.pad(axes * largest.sign(), (0, 3 - axes.shape[2]))
        coordinates = (vectors - mean) @ axes
        half = coordinates.abs().quantile(0.98, dim=1, keepdim=True)
        half = half.maximum(half[..., :1] / 3).clamp(min=LEAST_SPREAD)
        return cls(*(x.numpy() for x in (mean, axes, half)))

    @classmethod
    def load(cls, path, levels, width):
        """The projection in a file. None if there is no file, or it is damaged, or it is for other
        levels or another width."""
        shapes = {"mean": (levels, 1, width), "axes": (levels, width, 3), "half": (levels, 1, 3)}
        arrays = load_arrays(path, shapes)
        if arrays is None:
            return None
        fits = all(arrays[name].shape == shape for name, shape in shapes.items())
        return cls(**arrays) if fits and all(a.dtype.kind == "f" for a in arrays.values()) else None

    def save(self, path):
        """Write it to a file, as .npz."""
        with written_whole(path, "wb") as file:
            np.savez(file, mean=self.mean, axes=self.axes, half=self.half)

    def _coordinates(self, vectors):
        """Unit vectors (..., K, n, d) -> coordinates (..., K, n, 3) on the axes, from -1 to 1."""
        return np.clip((vectors - self.mean) @ self.axes / self.half, -1, 1)

    def explained_variance(self, states):
        """The share of the variance of the unit vectors that colours show, for each level.

        Args:
            states: (B, n, K, d).

        Returns:
            (K,), from 0 to 1. It is 1 where all vectors are equal.
        """
        vectors = F.normalize(states.nan_to_num().double(), dim=-1)
        vectors = vectors.flatten(0, 1).transpose(0, 1).numpy()  # (K, B*n, d)
        projected = self._coordinates(vectors) * self.half
        variance = [x.var(1).sum(-1) for x in (projected, vectors)]
        return np.divide(*variance, out=np.ones(len(vectors)), where=variance[1] > 1e-12)

    def colours(self, states):
        """states (..., n, K, d) -> colours (..., K, S, S, 3) of sRGB, from 0 to 1."""
        vectors = F.normalize(states.double(), dim=-1).movedim(-2, -3).numpy()
        coordinates = self._coordinates(vectors)
        side = round(coordinates.shape[-2] ** 0.5)
        return to_srgb(coordinates.reshape(*coordinates.shape[:-2], side, side, 3))


def load_arrays(path, names):
    """The arrays of an .npz file, by name. None if there is no such file, or it is damaged, or it
    lacks one of the names."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except Exception:  # a damaged file raises anything
        return None


def to_srgb(coordinates):
    """Colours of coordinates on the axes dark to light, blue to yellow, green to red of CIELAB.

    Steps of equal length look equally far apart in CIELAB (CIE 1976), and hue does not change with
    lightness. Colours beyond sRGB are clipped.

    Args:
        coordinates: (..., 3), from -1 to 1.

    Returns:
        (..., 3) of sRGB, from 0 to 1.

    Example:
        >>> import numpy as np
        >>> (255 * to_srgb(np.zeros(3))).round().tolist()  # gray: lightness of 60 from 0 to 100
        [145.0, 145.0, 145.0]
    """
    ranges = np.array((LIGHTNESS, BLUE_YELLOW, RED_GREEN))
    lab = ranges.mean(1) + coordinates * (np.ptp(ranges, axis=1) / 2)
    light, b, a = np.moveaxis(lab, -1, 0)
    return lab2rgb(np.stack((light, a, b), -1))

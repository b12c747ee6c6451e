"""Moving scenes of PartWhole: objects and parts that move by known steps, with masks.

The first frame of clip i is scene i. Every object moves on a straight line and turns back before
its centre comes near the border; its parts sway about their places. Background, clutter and what
lies in front stand still. The same arguments give the same bytes on every machine.
"""

from dataclasses import dataclass

import numpy as np

from agglomerator.data.sets.partwhole import Layout

STEP = 0.5 / 32, 1.5 / 32  # of an object in a frame, in image sides
BORDER = 0.3  # of the image, that centres keep out of
SWAY, PART_STEP = 0.12, 0.04  # of a part: greatest way from its place, and step, in half objects


@dataclass(frozen=True)
class Clip:
    """A moving scene of F frames; S is the image size.

    Attributes:
        images: (F, 3, S, S) uint8.
        label: index in CLASSES of object 1.
        parts, objects: (F, S, S) uint8: 0 background; 1, 2, ... the parts and objects that are
            visible in any frame. A thing has the same number in all frames.
        part_names: the name of part i, at i - 1.
        steps: (F - 1, n_parts, 2), how far each part moves from frame to frame: x, y in pixels.
    """

    images: np.ndarray
    label: int
    parts: np.ndarray
    objects: np.ndarray
    part_names: tuple
    steps: np.ndarray


def draw_clip(seed, index, frames, image_size=32, difficulty=1, objects=1):
    """Draw a moving scene.

    Args:
        seed, index, image_size, difficulty, objects: as for `draw_scene`.
        frames: F, 1 or more.

    Returns:
        A `Clip`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> clip = draw_clip(seed=0, index=2, frames=4)
        >>> clip.images.shape, clip.objects.shape, clip.steps.shape
        ((4, 3, 32, 32), (4, 32, 32), (3, 6, 2))
    """
    scene = Layout(seed, index, image_size, difficulty, objects)
    of_objects, of_shapes = _ways(scene, frames)
    images, tops = [], []
    for shift, sway in zip(of_objects, of_shapes, strict=True):
        image, top = scene.draw(_shifted(scene.maps, shift), scene.centres + sway)
        images.append(image)
        tops.append(top)
    tops = np.stack(tops)
    parts, objects, names = scene.number(tops)
    places = _to_image(scene, of_objects, of_shapes) * image_size
    shapes = np.setdiff1d(tops, 0).astype(int) - 1
    visible = shapes[scene.object_of[shapes] > 0]
    steps = np.diff(places[:, visible], axis=0)
    return Clip(np.stack(images), scene.label, parts, objects, names, steps)


def _ways(scene, frames):
    """Shifts (F, n, 2) of the sprites, in image sides, and (F, L, 2) of the shapes, in object
    coordinates; those of the first frame, and of what stands still, are 0."""
    uniform, moves = scene.uniform, (scene.numbers > 0)[:, None]
    n = len(scene.numbers)
    tangent = uniform(n, low=-1.0)
    direction = np.stack((1 - tangent * tangent, 2 * tangent), 1) / (1 + tangent * tangent)[:, None]
    sign = np.where(uniform(n) < 0.5, -1.0, 1.0)[:, None]
    step = moves * direction * sign * uniform(n, 1, low=STEP[0], high=STEP[1])
    centre = _centres(scene.maps)
    low, high = np.minimum(centre, BORDER) - centre, np.maximum(centre, 1 - BORDER) - centre
    sways = (scene.object_of > 0)[:, None]
    part_step = sways * uniform(len(scene.object_of), 2, low=-PART_STEP, high=PART_STEP)
    return _walk(step, low, high, frames), _walk(part_step, -SWAY, SWAY, frames)


def _walk(step, low, high, frames):
    """The ways (F, n, 2) of points that begin at 0 and turn back, in x and y apart, before they
    would leave the range low to high."""
    place, places = np.zeros_like(step), []
    for _ in range(frames):
        places.append(place)
        outside = (place + step < low) | (place + step > high)
        step = np.where(outside, -step, step)
        place = place + step
    return np.stack(places)


def _centres(maps):
    """The points (n, 2) of the image that maps (n, 6) take to the origin."""
    a, b, c, d, e, f = maps.T
    determinant = a * e - b * d
    return np.stack(((b * f - c * e) / determinant, (c * d - a * f) / determinant), 1)


def _shifted(maps, shift):
    """Maps (n, 6) of sprites that are shifted in the image by (n, 2)."""
    a, b, c, d, e, f = maps.T
    x, y = shift.T
    return np.stack((a, b, c - (a * x + b * y), d, e, f - (d * x + e * y)), 1)


def _to_image(scene, of_objects, of_shapes):
    """The ways (F, L, 2) of all shapes, in image sides."""
    sprite = np.repeat(np.arange(len(scene.maps)), [len(s.names) for s in scene.sprites])
    a, b, _, d, e, _ = scene.maps[sprite].T
    x, y = np.moveaxis(of_shapes, -1, 0)
    determinant = a * e - b * d
    sway = np.stack(((e * x - b * y) / determinant, (a * y - d * x) / determinant), -1)
    return of_objects[:, sprite] + sway

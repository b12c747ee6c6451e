"""PartWhole: drawn scenes in which the part and the object of every pixel are known.

A scene holds one or several objects (face, house, car, ...). An object is a short table of parts;
a part is an ellipse or a convex polygon. Some parts occur in several objects (wheel, window, eye).
Scenes are drawn from a seed; nothing is downloaded.

The same arguments give the same bytes on every machine: random numbers are raw PCG64 bits, and the
drawing uses only operations that IEEE 754 rounds exactly (+ - * / sqrt; no sin, no BLAS sum that
could round).

`PYTHONPATH=src python -m agglomerator.data.sets.partwhole img/PartWhole.png` draws a sheet of them.
"""

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from agglomerator.data.sets.partwhole_drawing import (
    DIFFICULTIES,
    Uniform,
    arrange,
    background_of,
    colours_of,
    compose,
    distances_to,
    vary,
)
from agglomerator.data.sets.partwhole_objects import CLASSES

SPLITS = {"train": 20000, "test": 4000}


@dataclass(frozen=True)
class Scene:
    """One drawn scene; S is the image size. Only visible parts and objects are numbered.

    Attributes:
        image: (3, S, S) uint8.
        label: index in CLASSES of object 1.
        parts: (S, S) uint8: 0 background; 1, 2, ... the parts of the whole scene. Every ellipse or
            polygon is a part of its own: two eyes are two.
        objects: (S, S) uint8: 0 background; 1, 2, ... the objects.
        part_names: the name of part i, one of PARTS, at i - 1.
    """

    image: np.ndarray
    label: int
    parts: np.ndarray
    objects: np.ndarray
    part_names: tuple


def _check(name, value, smallest, largest):
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and smallest <= value <= largest):
        raise ValueError(f"{name}={value!r} is not an integer from {smallest} to {largest}")


def draw_scene(seed, index, image_size=32, difficulty=1, objects=1):
    """Draw scene number `index` of the endless series `seed`.

    The class of the scene is that of object 1, the largest one and in front of the others. It is
    index % len(CLASSES), so that classes are balanced. The layout does not depend on image_size:
    another size draws the same scene finer or coarser.

    Args:
        seed, index: integers from 0 on.
        image_size: side S in pixels, 28 to 128.
        difficulty: 0: upright, almost equal size, plain background. 1: rotated by up to 20 degrees,
            smaller, with mild texture and up to 4 shapes in the background. 2: rotated by up to 38
            degrees, with strong texture, up to 10 shapes, and a bar or disc in front that hides
            some of object 1. Those shapes, the bar and the disc are background in both masks.
        objects: the greatest number of objects, 1 to 9. The number in a scene is random.

    Returns:
        A `Scene`.

    Raises:
        ValueError: an argument is out of range.
    """
    scene = Layout(seed, index, image_size, difficulty, objects)
    image, top = scene.draw()
    (parts,), (objects,), names = scene.number(top[None])
    return Scene(image, scene.label, parts, objects, names)


class Layout:
    """What makes up a scene, before it is drawn. The arguments are those of `draw_scene`.

    Attributes:
        label: index in CLASSES.
        uniform: the random numbers that the scene has left over.
        maps: (n, 6), for each sprite, back to front, the map from image to object coordinates.
        numbers: (n,) of objects; 0 for clutter and what lies in front.
        names: of the L shapes, back to front.
        object_of: (L,) number of the object that each shape belongs to.
        centres: (L, 2) of the shapes, in object coordinates.
    """

    def __init__(self, seed, index, image_size, difficulty, objects):
        _check("seed", seed, 0, 2**63 - 1)
        _check("index", index, 0, 2**32 - 1)
        _check("image_size", image_size, 28, 128)
        _check("difficulty", difficulty, 0, len(DIFFICULTIES) - 1)
        _check("objects", objects, 1, 9)
        setting = DIFFICULTIES[difficulty]
        self.label, self.image_size = int(index % len(CLASSES)), image_size
        self.uniform = uniform = Uniform(int(seed), int(index))
        self.sprites, self.maps, self.numbers = arrange(uniform, self.label, setting, objects)
        self.names = [name for sprite in self.sprites for name in sprite.names]
        shapes = [len(sprite.names) for sprite in self.sprites]
        self.object_of = np.repeat(self.numbers, shapes)
        self.centres, self.scale = vary(uniform, self.sprites)
        ground, self.colours = colours_of(uniform, self.sprites, self.numbers)
        slope_x, slope_y = uniform(2, low=-0.2, high=0.2)
        pixels = (np.arange(image_size) + 0.5) / image_size - 0.5
        self.light = 1 + (slope_x * pixels + (slope_y * pixels)[:, None])
        self.background = background_of(uniform, *ground, setting.texture, image_size)

    def draw(self, maps=None, centres=None):
        """The image (3, S, S) uint8, and the topmost shape at each pixel, (S, S) uint8, from 1; 0
        where there is none. `maps` and `centres` take the place of its own."""
        maps = self.maps if maps is None else maps
        centres = self.centres if centres is None else centres
        distances = distances_to(self.sprites, maps, centres, self.scale, self.image_size)
        layers = np.arange(1, len(distances) + 1, dtype=np.uint8)
        top = np.where(distances < 0, layers[:, None, None], np.uint8(0)).max(axis=0)
        return compose(distances, self.colours, self.background, self.light), top

    def number(self, tops):
        """Number the visible parts and objects of frames, from 1 on, the same in all of them.

        Args:
            tops: (F, S, S), from `draw`.

        Returns:
            (parts, objects, part_names): masks (F, S, S) uint8, and the name of part i at i - 1.
        """
        seen = np.bincount(tops.ravel(), minlength=len(self.names) + 1)[1:] > 0
        is_part = seen & (self.object_of > 0)
        part_of = np.cumsum(is_part) * is_part
        seen_objects = np.unique(self.object_of[is_part])
        object_of = (np.searchsorted(seen_objects, self.object_of) + 1) * is_part
        masks = (np.append(0, of).astype(np.uint8)[tops] for of in (part_of, object_of))
        return *masks, tuple(self.names[i] for i in np.flatnonzero(is_part))


class PartWhole(Dataset):
    """A split of PartWhole scenes, each drawn when it is read.

    Args:
        split: "train" or "test". The two never share a scene, whatever their sizes.
        size: number of scenes; None for 20000 (train) or 4000 (test).
        seed, image_size, difficulty, objects: as for `draw_scene`.

    Raises:
        ValueError: an argument is out of range.
    """

    classes = CLASSES
    TEST_START = 1_000_000_000  # index of the first test scene in the series of a seed

    def __init__(self, split="train", size=None, seed=0, image_size=32, difficulty=1, objects=1):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
        self.size = SPLITS[split] if size is None else size
        _check("size", self.size, 1, self.TEST_START)
        self.start = self.TEST_START if split == "test" else 0
        self.seed = seed
        self.settings = {"image_size": image_size, "difficulty": difficulty, "objects": objects}
        draw_scene(seed, self.start, **self.settings)  # so that a bad argument raises at once

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        """Scene i, 0 <= i < len(self)."""
        if not 0 <= i < self.size:
            raise IndexError(f"scene {i} of {self.size}")
        return draw_scene(self.seed, self.start + i, **self.settings)

    def arrays(self):
        """All scenes: images (N, 3, S, S), labels (N,), parts (N, S, S), objects (N, S, S).

        Labels are int64, the others uint8.
        """
        side = self.settings["image_size"]
        images = np.empty((self.size, 3, side, side), np.uint8)
        labels = np.empty(self.size, np.int64)
        parts = np.empty((self.size, side, side), np.uint8)
        objects = np.empty_like(parts)
        for i in range(self.size):
            scene = self[i]
            images[i], labels[i] = scene.image, scene.label
            parts[i], objects[i] = scene.parts, scene.objects
        return images, labels, parts, objects


def draw_sheet(path):
    """Draw a scene of every class and difficulty (at 96x96, at 32x32, parts, objects) as a picture
    file."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = colormaps["tab20"](range(20))[:, :3]
    colours = np.concatenate(([[0, 0, 0]], np.tile(colours, (13, 1))))
    figure = Figure(figsize=(9.6, 0.85 * len(CLASSES)), layout="constrained")
    axes = figure.subplots(len(CLASSES), 12)
    for row, name in enumerate(CLASSES):
        for difficulty in range(3):
            index = row + difficulty * len(CLASSES)
            large, small = (draw_scene(1, index, size, difficulty) for size in (96, 32))
            shown = [scene.image.transpose(1, 2, 0) for scene in (large, small)]
            shown += [colours[large.parts], colours[large.objects]]
            for ax, picture in zip(axes[row, 4 * difficulty :], shown, strict=False):
                ax.imshow(picture)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    for column, title in enumerate(("96x96", "32x32", "parts", "objects") * 3):
        above = "" if column % 4 else f"difficulty {column // 4}"
        axes[0, column].set_title(f"{above}\n{title}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    import sys

    draw_sheet(*sys.argv[1:])

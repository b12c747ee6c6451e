"""PartWhole: drawn scenes in which the part and the object of every pixel are known.

A scene holds one or several objects (face, house, car, ...). An object is a short table of parts;
a part is an ellipse or a convex polygon. Some parts occur in several objects (wheel, window, eye).
Scenes are drawn from a seed; nothing is downloaded.

The same arguments give the same bytes on every machine: random numbers are raw PCG64 bits, and the
drawing uses only operations that IEEE 754 rounds exactly (+ - * / sqrt; no sin, no BLAS sum that
could round).

`PYTHONPATH=src python -m agglomerator.data.sets.partwhole img/PartWhole.png` draws a sheet of them.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

# One row per part, back to front: name, shape, numbers. x points right, y down, both -1 to 1.
# ellipse: centre x, y, radius x, y; box: left, top, right, bottom; polygon: x, y of each corner,
# convex, clockwise on the screen.
OBJECTS = {
    "face": (
        ("ear", "ellipse", -0.84, -0.02, 0.16, 0.26),
        ("ear", "ellipse", 0.84, -0.02, 0.16, 0.26),
        ("head", "ellipse", 0.0, 0.0, 0.82, 0.98),
        ("eye", "ellipse", -0.34, -0.26, 0.21, 0.17),
        ("eye", "ellipse", 0.34, -0.26, 0.21, 0.17),
        ("nose", "polygon", 0.0, -0.12, 0.16, 0.26, -0.16, 0.26),
        ("mouth", "polygon", -0.46, 0.44, 0.46, 0.44, 0.26, 0.7, -0.26, 0.7),
    ),
    "house": (
        ("chimney", "box", 0.42, -0.92, 0.72, -0.2),
        ("wall", "box", -0.76, -0.15, 0.76, 0.96),
        ("roof", "polygon", -1.0, -0.08, 0.0, -0.98, 1.0, -0.08),
        ("door", "box", 0.12, 0.26, 0.54, 0.96),
        ("window", "box", -0.56, 0.16, -0.1, 0.6),
    ),
    "car": (
        ("cabin", "polygon", -0.7, 0.1, -0.4, -0.58, 0.34, -0.58, 0.72, 0.1),
        ("window", "polygon", -0.54, 0.02, -0.32, -0.46, -0.06, -0.46, -0.06, 0.02),
        ("window", "polygon", 0.08, 0.02, 0.08, -0.46, 0.26, -0.46, 0.54, 0.02),
        ("body", "polygon", -1.0, 0.1, 0.7, 0.02, 1.0, 0.18, 1.0, 0.54, -1.0, 0.54),
        ("wheel", "ellipse", -0.54, 0.54, 0.28, 0.28),
        ("wheel", "ellipse", 0.54, 0.54, 0.28, 0.28),
    ),
    "bus": (
        ("body", "box", -1.0, -0.72, 1.0, 0.56),
        ("window", "box", -0.86, -0.52, -0.46, -0.04),
        ("window", "box", -0.3, -0.52, 0.1, -0.04),
        ("door", "box", 0.3, -0.52, 0.8, 0.56),
        ("wheel", "ellipse", -0.58, 0.58, 0.26, 0.26),
        ("wheel", "ellipse", 0.16, 0.58, 0.26, 0.26),
    ),
    "tree": (
        ("trunk", "polygon", -0.14, 0.1, 0.14, 0.1, 0.22, 1.0, -0.22, 1.0),
        ("crown", "ellipse", 0.0, -0.32, 0.8, 0.66),
        ("fruit", "ellipse", -0.38, -0.2, 0.16, 0.16),
        ("fruit", "ellipse", 0.06, -0.64, 0.16, 0.16),
        ("fruit", "ellipse", 0.36, -0.12, 0.16, 0.16),
    ),
    "boat": (
        ("mast", "box", -0.08, -0.98, 0.08, 0.5),
        ("sail", "polygon", 0.12, -0.9, 0.9, 0.3, 0.12, 0.3),
        ("sail", "polygon", -0.12, -0.6, -0.12, 0.3, -0.74, 0.3),
        ("hull", "polygon", -1.0, 0.42, 1.0, 0.42, 0.64, 0.94, -0.64, 0.94),
    ),
    "robot": (
        ("leg", "box", -0.4, 0.4, -0.1, 1.0),
        ("leg", "box", 0.1, 0.4, 0.4, 1.0),
        ("arm", "box", -0.84, -0.18, -0.46, 0.38),
        ("arm", "box", 0.46, -0.18, 0.84, 0.38),
        ("body", "box", -0.5, -0.24, 0.5, 0.5),
        ("head", "box", -0.46, -1.0, 0.46, -0.26),
        ("eye", "ellipse", -0.21, -0.76, 0.15, 0.14),
        ("eye", "ellipse", 0.21, -0.76, 0.15, 0.14),
        ("mouth", "box", -0.28, -0.54, 0.28, -0.38),
    ),
    "fish": (
        ("tail", "polygon", 0.36, 0.0, 1.0, -0.54, 1.0, 0.54),
        ("fin", "polygon", -0.4, -0.36, 0.3, -0.82, 0.3, -0.26),
        ("fin", "polygon", -0.3, 0.36, 0.24, 0.3, 0.3, 0.76),
        ("body", "ellipse", -0.24, 0.0, 0.76, 0.52),
        ("eye", "ellipse", -0.58, -0.14, 0.16, 0.16),
        ("mouth", "polygon", -1.0, 0.1, -0.64, 0.18, -0.88, 0.34),
    ),
    "flower": (
        ("leaf", "polygon", 0.0, 0.86, 0.26, 0.48, 0.72, 0.42, 0.5, 0.78),
        ("leaf", "polygon", 0.0, 0.86, -0.5, 0.78, -0.72, 0.42, -0.26, 0.48),
        ("stem", "box", -0.1, 0.0, 0.1, 1.0),
        ("petal", "ellipse", 0.0, -0.72, 0.29, 0.28),
        ("petal", "ellipse", 0.4, -0.44, 0.29, 0.28),
        ("petal", "ellipse", 0.26, 0.02, 0.29, 0.28),
        ("petal", "ellipse", -0.26, 0.02, 0.29, 0.28),
        ("petal", "ellipse", -0.4, -0.44, 0.29, 0.28),
        ("centre", "ellipse", 0.0, -0.31, 0.26, 0.26),
    ),
    "rocket": (
        ("flame", "polygon", -0.22, 0.56, 0.22, 0.56, 0.0, 1.0),
        ("fin", "polygon", -0.28, 0.02, -0.28, 0.62, -0.76, 0.78),
        ("fin", "polygon", 0.28, 0.02, 0.76, 0.78, 0.28, 0.62),
        ("body", "box", -0.34, -0.48, 0.34, 0.64),
        ("nose", "polygon", -0.36, -0.46, 0.0, -1.0, 0.36, -0.46),
        ("window", "ellipse", 0.0, -0.16, 0.2, 0.2),
    ),
}
# Shapes that belong to the background: scattered behind the objects, or in front of them.
CLUTTER = (
    ("background", "ellipse", 0.0, 0.0, 1.0, 1.0),
    ("background", "box", -1.0, -0.8, 1.0, 0.8),
    ("background", "polygon", -1.0, 0.8, 0.0, -1.0, 1.0, 0.8),
    ("background", "box", -1.0, -0.25, 1.0, 0.25),
)
OCCLUDERS = (
    ("background", "box", -6.0, -0.2, 6.0, 0.2),
    ("background", "ellipse", 0.0, 0.0, 0.36, 0.36),
)

CLASSES = tuple(OBJECTS)
PARTS = tuple(dict.fromkeys(part[0] for parts in OBJECTS.values() for part in parts))
SPLITS = {"train": 20000, "test": 4000}

# At least 70 apart in RGB, so that any two can be told apart.
_PALETTE = np.array(
    [
        (228, 26, 40), (60, 180, 75), (250, 220, 40), (40, 70, 200), (245, 130, 48), (145, 30, 180),
        (70, 225, 235), (240, 50, 230), (180, 235, 70), (250, 170, 190), (0, 125, 125),
        (195, 165, 250), (150, 95, 35), (125, 0, 40), (165, 245, 175), (85, 115, 10),
        (245, 208, 122), (10, 10, 105), (130, 130, 135), (248, 248, 240), (25, 25, 25),
        (80, 150, 240),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class _Difficulty:
    half_side: tuple  # of the object, in image sides
    tilt: float  # tangent of half the greatest rotation
    clutter: int  # greatest number of shapes behind the objects
    texture: float  # strength of the background's texture
    occluders: int


_DIFFICULTIES = (
    _Difficulty((0.43, 0.47), 0.0, 0, 0.0, 0),
    _Difficulty((0.36, 0.46), 0.17, 4, 0.35, 0),
    _Difficulty((0.33, 0.46), 0.34, 10, 0.8, 1),
)


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


_SIDE, _U, _V = range(3)


class _Sprite:
    """The shapes of one table as linear forms n.(p - centre) - offset of the point p.

    Inside a convex polygon the forms of all its sides are below 0. An ellipse has two forms, u and
    v; inside it u^2 + v^2 < 1.
    """

    def __init__(self, table):
        self.names = tuple(row[0] for row in table)
        centres, forms, kinds, counts = [], [], [], []
        for _, shape, *numbers in table:
            if shape == "ellipse":
                x, y, radius_x, radius_y = numbers
                centres.append((x, y))
                forms += [(1 / radius_x, 0.0, 0.0), (0.0, 1 / radius_y, 0.0)]
                kinds += [_U, _V]
                counts.append(2)
                continue
            if shape == "box":
                left, top, right, bottom = numbers
                numbers = (left, top, right, top, right, bottom, left, bottom)
            x, y = np.array(numbers[::2]), np.array(numbers[1::2])
            centre_x, centre_y = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
            x, y = x - centre_x, y - centre_y
            side_x, side_y = np.roll(x, -1) - x, np.roll(y, -1) - y
            centres.append((centre_x, centre_y))
            forms += zip(side_y, -side_x, side_y * x - side_x * y, strict=True)
            kinds += [_SIDE] * len(x)
            counts.append(len(x))
        self.centres = np.array(centres)
        self.forms = np.array(forms)
        self.kinds = np.array(kinds)
        self.counts = np.array(counts)


_OBJECTS = tuple(_Sprite(table) for table in OBJECTS.values())
_CLUTTER = tuple(_Sprite([row]) for row in CLUTTER)
_OCCLUDERS = tuple(_Sprite([row]) for row in OCCLUDERS)


class _Uniform:
    """Random numbers in [low, high) from the raw bits of PCG64, which numpy never changes."""

    def __init__(self, seed, index):
        self.bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,)))

    def __call__(self, *shape, low=0.0, high=1.0):
        raw = self.bits.random_raw(math.prod(shape)).reshape(shape) >> np.uint64(11)
        return raw * ((high - low) * 2.0**-53) + low

    def integer(self, stop):
        return (self.bits.random_raw() >> 11) * stop >> 53


def _place(uniform, centres, half_sides, tilt):
    """Maps (n, 6) from image to object coordinates: x' = a x + b y + c, y' = d x + e y + f."""
    n = len(half_sides)
    tangent = uniform(n, low=-tilt, high=tilt)
    cos = (1 - tangent * tangent) / (1 + tangent * tangent)
    sin = 2 * tangent / (1 + tangent * tangent)
    narrow = uniform(n, low=0.85, high=1.0)
    wide = uniform(n) < 0.5
    width = half_sides * np.where(wide, 1.0, narrow) * np.where(uniform(n) < 0.5, -1.0, 1.0)
    height = half_sides * np.where(wide, narrow, 1.0)
    x, y = centres.T
    return np.stack(
        (
            cos / width,
            sin / width,
            -(cos * x + sin * y) / width,
            -sin / height,
            cos / height,
            (sin * x - cos * y) / height,
        ),
        axis=1,
    )


def _arrange(uniform, label, difficulty, objects):
    """The sprites of a scene, back to front, their maps (n, 6) and object numbers (n,)."""
    count = 1 + uniform.integer(objects)
    rows = next(rows for rows in (1, 2, 3) if rows * rows >= count)
    cells = np.argsort(uniform(rows * rows))[:count]
    smallest, largest = difficulty.half_side
    half_sides = uniform(count, low=smallest, high=largest) / rows
    half_sides[1:] *= 0.75
    slack = (0.5 / rows - half_sides)[:, None] + 0.05 * (rows - 1)
    grid = np.stack((cells % rows, cells // rows), axis=1)
    centres = (grid + 0.5) / rows + slack * uniform(count, 2, low=-1.0)
    margin = half_sides[:, None]
    centres = np.clip(centres, margin, 1 - margin)
    labels = [label] + [uniform.integer(len(CLASSES)) for _ in range(count - 1)]
    maps = _place(uniform, centres, half_sides, difficulty.tilt)
    sprites = [_OBJECTS[i] for i in reversed(labels)]
    maps, numbers = maps[::-1], np.arange(count, 0, -1)

    if difficulty.clutter:
        n = 1 + uniform.integer(difficulty.clutter)
        behind = _place(uniform, uniform(n, 2), uniform(n, low=0.05, high=0.2), tilt=1.0)
        sprites = [_CLUTTER[uniform.integer(len(_CLUTTER))] for _ in range(n)] + sprites
        maps, numbers = np.concatenate((behind, maps)), np.concatenate((np.zeros(n, int), numbers))
    for _ in range(difficulty.occluders):
        offset = uniform(1, 2, low=-0.6, high=0.6) * half_sides[0]
        front = _place(uniform, centres[:1] + offset, half_sides[:1], tilt=1.0)
        sprites = [*sprites, _OCCLUDERS[uniform.integer(len(_OCCLUDERS))]]
        maps, numbers = np.concatenate((maps, front)), np.append(numbers, 0)
    return sprites, maps, numbers


def _vary(uniform, sprites):
    """Shift and scale each shape a little, in its own way: centres (L, 2) and scales (L,)."""
    centres = np.concatenate([sprite.centres for sprite in sprites])
    shapes = len(centres)
    centres = centres + uniform(shapes, 2, low=-0.03, high=0.03)
    return centres, uniform(shapes, low=0.92, high=1.08)


def _distances(sprites, maps, centres, scale, image_size):
    """Signed distances (L, S, S), in pixels, of every pixel's centre to every shape's edge.

    They are negative inside. The shapes have centres (L, 2) and scales (L,).
    """
    counts = np.concatenate([sprite.counts for sprite in sprites])
    kinds = np.concatenate([sprite.kinds for sprite in sprites])
    normals = np.concatenate([sprite.forms for sprite in sprites])
    maps = np.repeat(maps, [len(sprite.counts) for sprite in sprites], axis=0)
    # From here on one column per form: its value at pixel (x, y) is a x + b y + c.
    a, b, c, d, e, f = (maps / scale[:, None]).repeat(counts, axis=0).T
    centre_x, centre_y = (centres / scale[:, None]).repeat(counts, axis=0).T
    normal_x, normal_y, offset = normals.T
    slope_x = (normal_x * a + normal_y * d) / image_size
    slope_y = (normal_x * b + normal_y * e) / image_size
    constant = normal_x * (c - centre_x) + normal_y * (f - centre_y) - offset
    steepness = np.sqrt(slope_x * slope_x + slope_y * slope_y)
    unit = np.where(kinds == _SIDE, steepness, 1.0)

    pixels = np.arange(image_size) + 0.5
    forms_x = ((slope_x / unit)[:, None] * pixels + (constant / unit)[:, None]).astype(np.float32)
    forms_y = ((slope_y / unit)[:, None] * pixels).astype(np.float32)
    steepness = steepness.astype(np.float32)
    side, u, v = kinds == _SIDE, kinds == _U, kinds == _V

    def field(form):
        return forms_x[form, None, :] + forms_y[form, :, None]

    distances = np.empty((len(counts), image_size, image_size), np.float32)
    polygon = side[np.cumsum(counts) - 1]
    starts = np.cumsum(counts[polygon]) - counts[polygon]
    distances[polygon] = np.maximum.reduceat(field(side), starts, axis=0)
    # To first order an ellipse is (r^2 - r) / |gradient of r^2 / 2| away, where r^2 = u^2 + v^2.
    uu, vv = field(u), field(v)
    uu *= uu
    vv *= vv
    square = uu + vv + np.float32(1e-12)  # so that a pixel exactly at the centre is inside
    uu *= (steepness[u] * steepness[u])[:, None, None]
    vv *= (steepness[v] * steepness[v])[:, None, None]
    uu += vv
    gradient = np.sqrt(uu, out=uu)
    gradient += np.float32(1e-9)
    distances[~polygon] = (square - np.sqrt(square)) / gradient
    return distances


def _background(uniform, first, second, strength, image_size):
    """Texture (3, S, S) between two colours: stripes, dots or smooth noise, coarse or fine."""
    pixels = (np.arange(image_size) + 0.5) / image_size
    if not strength:
        return np.broadcast_to(first[:, None, None], (3, image_size, image_size))
    kind = uniform.integer(3)
    if kind == 2:
        grid = uniform(6, 6)
        left = (pixels * 5).astype(int)
        share = pixels * 5 - left
        rows = grid[left] + share[:, None] * (grid[left + 1] - grid[left])
        texture = rows[:, left] + share * (rows[:, left + 1] - rows[:, left])
    else:
        texture = 1.0
        for slope_x, slope_y, phase in uniform(kind + 1, 3, low=-1.0):
            phase = 4 * slope_x * pixels + (4 * slope_y * pixels)[:, None] + phase
            texture = texture * np.abs(2 * (phase - np.floor(phase)) - 1)
    return first[:, None, None] + (strength * (second - first))[:, None, None] * texture


def _colours(uniform, sprites, numbers):
    """Colours of the background (2, 3) and of all shapes (L, 3), in whole numbers.

    An object, its occluder and the ground colour of the background share no palette entry.
    """
    colours = _PALETTE[np.argsort(uniform(len(_PALETTE)))]
    ground, palette = colours[:2], colours[2:]
    picked = []
    front = True
    for sprite, number in zip(reversed(sprites), reversed(numbers), strict=True):
        n = len(sprite.names)
        if number > 1:
            order = np.argsort(uniform(len(palette)))[:n]
        elif number == 1:
            order, front = np.arange(n), False
        else:
            order = [len(palette) - 1 if front else uniform.integer(len(palette))]
        picked.append(palette[order])
    shapes = np.concatenate(picked[::-1])
    jitter = np.floor(uniform(len(shapes), 3, low=-12, high=13))
    return ground, np.clip(shapes + jitter, 0, 255)


def _compose(distances, colours, background, light):
    """Image (3, S, S) uint8 of the shapes, one over the other, with smooth edges."""
    cover = np.clip(0.5 - distances, 0.0, 1.0)
    through = np.ones((len(cover) + 1, *cover.shape[1:]), np.float32)
    np.cumprod(1 - cover[::-1], axis=0, out=through[1:])
    cover *= through[-2::-1]
    # Whole weights and colours, sums below 2^24: the product is exact in any order of summation.
    weights = np.rint(cover * 4096).reshape(len(cover), -1)
    image = (colours.T.astype(np.float32) @ weights).reshape(background.shape) / 4096.0
    image += through[-1] * background
    image *= light
    return np.clip(np.rint(image, out=image), 0, 255, out=image).astype(np.uint8)


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
        _check("difficulty", difficulty, 0, len(_DIFFICULTIES) - 1)
        _check("objects", objects, 1, 9)
        setting = _DIFFICULTIES[difficulty]
        self.label, self.image_size = int(index % len(CLASSES)), image_size
        self.uniform = uniform = _Uniform(int(seed), int(index))
        self.sprites, self.maps, self.numbers = _arrange(uniform, self.label, setting, objects)
        self.names = [name for sprite in self.sprites for name in sprite.names]
        shapes = [len(sprite.names) for sprite in self.sprites]
        self.object_of = np.repeat(self.numbers, shapes)
        self.centres, self.scale = _vary(uniform, self.sprites)
        ground, self.colours = _colours(uniform, self.sprites, self.numbers)
        slope_x, slope_y = uniform(2, low=-0.2, high=0.2)
        pixels = (np.arange(image_size) + 0.5) / image_size - 0.5
        self.light = 1 + (slope_x * pixels + (slope_y * pixels)[:, None])
        self.background = _background(uniform, *ground, setting.texture, image_size)

    def draw(self, maps=None, centres=None):
        """The image (3, S, S) uint8, and the topmost shape at each pixel, (S, S) uint8, from 1; 0
        where there is none. `maps` and `centres` take the place of its own."""
        maps = self.maps if maps is None else maps
        centres = self.centres if centres is None else centres
        distances = _distances(self.sprites, maps, centres, self.scale, self.image_size)
        layers = np.arange(1, len(distances) + 1, dtype=np.uint8)
        top = np.where(distances < 0, layers[:, None, None], np.uint8(0)).max(axis=0)
        return _compose(distances, self.colours, self.background, self.light), top

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

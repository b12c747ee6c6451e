"""How a scene of PartWhole is laid out and drawn.

Random numbers are raw PCG64 bits, and only operations are used that IEEE 754 rounds exactly.
"""

import math
from dataclasses import dataclass

import numpy as np

from agglomerator.data.sets.partwhole_objects import (
    CLASSES,
    CLUTTER_SPRITES,
    OBJECT_SPRITES,
    OCCLUDER_SPRITES,
    SIDE,
    U,
    V,
)

# At least 70 apart in RGB, so that any two can be told apart.
PALETTE = np.array(
    [
        (228, 26, 40), (60, 180, 75), (250, 220, 40), (40, 70, 200), (245, 130, 48), (145, 30, 180),
        (70, 225, 235), (240, 50, 230), (180, 235, 70), (250, 170, 190), (0, 125, 125),
        (195, 165, 250), (150, 95, 35), (125, 0, 40), (165, 245, 175), (85, 115, 10),
        (245, 208, 122), (10, 10, 105), (130, 130, 135), (248, 248, 240), (25, 25, 25),
        (80, 150, 240),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Difficulty:
    """How the scenes of a difficulty are laid out."""

    half_side: tuple  # of the object, in image sides
    tilt: float  # tangent of half the greatest rotation
    clutter: int  # greatest number of shapes behind the objects
    texture: float  # strength of the background's texture
    occluders: int


DIFFICULTIES = (
    Difficulty((0.43, 0.47), 0.0, 0, 0.0, 0),
    Difficulty((0.36, 0.46), 0.17, 4, 0.35, 0),
    Difficulty((0.33, 0.46), 0.34, 10, 0.8, 1),
)


class Uniform:
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


def arrange(uniform, label, difficulty, objects):
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
    sprites = [OBJECT_SPRITES[i] for i in reversed(labels)]
    maps, numbers = maps[::-1], np.arange(count, 0, -1)

    if difficulty.clutter:
        n = 1 + uniform.integer(difficulty.clutter)
        behind = _place(uniform, uniform(n, 2), uniform(n, low=0.05, high=0.2), tilt=1.0)
        sprites = [
            CLUTTER_SPRITES[uniform.integer(len(CLUTTER_SPRITES))] for _ in range(n)
        ] + sprites
        maps, numbers = np.concatenate((behind, maps)), np.concatenate((np.zeros(n, int), numbers))
    for _ in range(difficulty.occluders):
        offset = uniform(1, 2, low=-0.6, high=0.6) * half_sides[0]
        front = _place(uniform, centres[:1] + offset, half_sides[:1], tilt=1.0)
        sprites = [*sprites, OCCLUDER_SPRITES[uniform.integer(len(OCCLUDER_SPRITES))]]
        maps, numbers = np.concatenate((maps, front)), np.append(numbers, 0)
    return sprites, maps, numbers


def vary(uniform, sprites):
    """Shift and scale each shape a little, in its own way: centres (L, 2) and scales (L,)."""
    centres = np.concatenate([sprite.centres for sprite in sprites])
    shapes = len(centres)
    centres = centres + uniform(shapes, 2, low=-0.03, high=0.03)
    return centres, uniform(shapes, low=0.92, high=1.08)


def distances_to(sprites, maps, centres, scale, image_size):
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
    unit = np.where(kinds == SIDE, steepness, 1.0)

    pixels = np.arange(image_size) + 0.5
    forms_x = ((slope_x / unit)[:, None] * pixels + (constant / unit)[:, None]).astype(np.float32)
    forms_y = ((slope_y / unit)[:, None] * pixels).astype(np.float32)
    steepness = steepness.astype(np.float32)
    side, u, v = kinds == SIDE, kinds == U, kinds == V

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


def background_of(uniform, first, second, strength, image_size):
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


def colours_of(uniform, sprites, numbers):
    """Colours of the background (2, 3) and of all shapes (L, 3), in whole numbers.

    An object, its occluder and the ground colour of the background share no palette entry.
    """
    colours = PALETTE[np.argsort(uniform(len(PALETTE)))]
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


def compose(distances, colours, background, light):
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

"""The objects of PartWhole: short tables of parts, and their shapes as linear forms."""

import numpy as np

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

SIDE, U, V = range(3)


class Sprite:
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
                kinds += [U, V]
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
            kinds += [SIDE] * len(x)
            counts.append(len(x))
        self.centres = np.array(centres)
        self.forms = np.array(forms)
        self.kinds = np.array(kinds)
        self.counts = np.array(counts)


OBJECT_SPRITES = tuple(Sprite(table) for table in OBJECTS.values())
CLUTTER_SPRITES = tuple(Sprite([row]) for row in CLUTTER)
OCCLUDER_SPRITES = tuple(Sprite([row]) for row in OCCLUDERS)

"""Colours and shapes that tell classes and super-classes apart in pictures."""

from dataclasses import dataclass

import matplotlib
import numpy as np

SHAPES = "o^sDvPX<>*"
GRAY = "0.55"


@dataclass
class Marks:
    """Colours and shapes for the classes in pictures.

    Attributes:
        colours, shapes: of each class.
        legend: rows (text, colour, shape), in reading order. The colour is None for a super-class
            that stands above its classes.
        super_legend: the rows of the super-classes.
        branches: colours of the super-classes. None if each class has a colour of its own.
        note: what colours mean, if there is no legend.
    """

    colours: list
    shapes: list
    legend: list
    super_legend: list = ()
    branches: list | None = None
    note: str = ""

    @classmethod
    def of(cls, classes, hierarchy, order):
        """Choose colours that colour-blind people can tell apart (Petroff 2021, arXiv 2107.02270).

        Up to ten classes get a colour each, and the shape of their super-class. More classes get
        the colour and shape of their super-class. If there is no hierarchy, or it has more than
        thirty super-classes, each class gets its own colour and shape. More than thirty such
        classes get colours by their place in the class tree, so that near classes look alike.

        Args:
            classes: names.
            hierarchy: `Hierarchy` of the classes, or None.
            order: labels in the order of the leaves of the class tree.

        Example:
            >>> marks = Marks.of(["cat", "dog"], None, [0, 1])
            >>> [(text, shape) for text, _, shape in marks.legend]
            [('cat', 'o'), ('dog', 'o')]
        """
        ten = matplotlib.color_sequences["petroff10"]
        n = len(classes)

        def pair(i):
            darker = 0.6 ** (i // 10)
            return tuple(darker * part for part in ten[i % 10]), SHAPES[i // 10]

        tops = [] if hierarchy is None else hierarchy.super_classes
        if n <= 10 and hierarchy is not None:
            of_class = hierarchy.super_labels
            in_order = np.argsort(of_class, kind="stable")
            colours, shapes = [None] * n, [SHAPES[top] for top in of_class]
            legend = []
            for i, label in enumerate(in_order):
                top = of_class[label]
                if i == 0 or of_class[in_order[i - 1]] != top:
                    legend.append((tops[top], None, SHAPES[top]))
                colours[label] = ten[i]
                legend.append((classes[label], ten[i], SHAPES[top]))
            return cls(colours, shapes, legend, [row for row in legend if row[1] is None])
        if hierarchy is not None and len(tops) <= 30:
            pairs = [pair(i) for i in range(len(tops))]
            of_class = [pairs[top] for top in hierarchy.super_labels]
            legend = [(top, *pairs[i]) for i, top in enumerate(tops)]
            branches = [colour for colour, _ in pairs]
            return cls(*map(list, zip(*of_class, strict=True)), legend, legend, branches)
        if n <= 30:
            pairs = [pair(i) for i in range(n)]
            legend = [(name, *pairs[i]) for i, name in enumerate(classes)]
            return cls(*map(list, zip(*pairs, strict=True)), legend)
        colours = [GRAY] * n
        for place, label in enumerate(order):
            colours[label] = matplotlib.colormaps["viridis"](place / max(len(order) - 1, 1))
        return cls(colours, ["o"] * n, [], note="; colours in the order of the class tree")

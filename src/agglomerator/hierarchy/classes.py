"""Hierarchies of classes: the super-classes that people sort the classes of a data set into.

A hierarchy is a text file with a line for each group: the path of the group, a colon, its classes.
A group may hold classes and groups. A line that begins with `#` is a comment. The known hierarchies
are such files, in `known/`.

    animals: fish
    animals/mammals: cat, dog
    vehicles: car, ship
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agglomerator.util.errors import UserError

KNOWN = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Hierarchy:
    """A tree whose leaves are the classes of a data set.

    Attributes:
        name: of a known hierarchy, or the path of its file.
        classes: names, in the order of labels.
        paths: for each class a tuple of the groups above it, topmost first. Groups that hold all
            classes are left out.
        super_classes: the topmost groups. A class that is in no group counts as one.

    Example:
        >>> paths = [("animals", "mammals"), ("animals", "mammals"), ("animals",), ()]
        >>> classes = ["cat", "dog", "fish", "ship"]
        >>> hierarchy = Hierarchy("example", classes, paths, ["animals", "ship"])
        >>> hierarchy.super_labels.tolist()
        [0, 0, 0, 1]
        >>> hierarchy.distances()[0].tolist()  # of the cat
        [0.0, 1.0, 2.0, 3.0]
    """

    name: str
    classes: Sequence[str]
    paths: Sequence[tuple]
    super_classes: Sequence[str]

    @property
    def super_labels(self):
        """Index of the super-class of each class, (n_classes,)."""
        tops = [(*path, name)[0] for name, path in zip(self.classes, self.paths, strict=True)]
        return np.array([self.super_classes.index(top) for top in tops])

    def distances(self):
        """Distances between classes, (n_classes, n_classes).

        The distance of two classes is the height of their lowest common ancestor: the steps from it
        down to its lowest class (Bertinetto et al. 2020, arXiv 1912.09393). With one layer of
        super-classes it is 1 within a super-class and 2 across.
        """
        heights = {}
        for path in self.paths:
            for depth in range(len(path) + 1):
                height = len(path) + 1 - depth
                heights[path[:depth]] = max(height, heights.get(path[:depth], 0))
        n = len(self.paths)
        distances = np.zeros((n, n))
        for i in range(n):
            for j in range(i):
                above = self.paths[i][: _n_common((self.paths[i], self.paths[j]))]
                distances[i, j] = distances[j, i] = heights[above]
        return distances


def hierarchy_of(settings, classes):
    """The hierarchy of the classes of a run.

    It is the file of --hierarchy. Without that flag it is the known hierarchy of the data set, or
    another one that knows all of the class names, or None.

    Args:
        settings: of the run; `hierarchy` and `dataset` count.
        classes: names, in the order of labels.

    Raises:
        UserError: the file is missing or wrong, or does not fit the classes.
    """
    if len(classes) < 2:
        return None
    if settings.hierarchy is not None:
        places = _read(Path(settings.hierarchy))
        _check_names(settings.hierarchy, places, classes)
        hierarchy = _of_classes(settings.hierarchy, places, classes)
        if hierarchy is None:
            raise UserError(
                f"--hierarchy={settings.hierarchy}: all {len(classes)} classes are equally far "
                "apart; put some of them into one group."
            )
        return hierarchy
    paths = sorted(KNOWN.glob("*.txt"), key=lambda path: (path.stem != settings.dataset, path.stem))
    for path in paths:
        places = _read(path)
        if set(classes) <= set(places):
            return _of_classes(path.stem, places, classes)
    return None


def known_classes(name):
    """Names of the classes of a known hierarchy, in alphabetical order.

    Example:
        >>> known_classes("CIFAR10")[:3]
        ['airplane', 'automobile', 'bird']
    """
    return sorted(_read(KNOWN / f"{name}.txt"))


def _read(path):
    """The place of each class: a dictionary of class -> (groups above it, number of its line), in
    the order of the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"--hierarchy={path}: {error.strerror}; name a file with lines like animals: cat, dog."
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"--hierarchy={path}: is not a text file; name one with lines like animals: cat, dog."
        ) from None
    places = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--hierarchy={path}: line {number}"
        group, colon, names = line.partition(":")
        groups = [part.strip() for part in group.split("/")] if group.strip() else []
        names = [name.strip() for name in names.split(",")]
        if not colon or not any(names):
            raise UserError(f"{where}: {line!r} should be a group and its classes, like a/b: c, d.")
        if not all(groups) or not all(names):
            raise UserError(f"{where}: a name is missing between two commas or slashes.")
        for name in names:
            if name in places:
                raise UserError(
                    f"{where}: {name} stands in line {places[name][1]} already; give each class "
                    "one place."
                )
            places[name] = tuple(groups), number
    for groups, number in places.values():
        if clash := set(groups) & places.keys():
            raise UserError(
                f"--hierarchy={path}: line {number}: {clash.pop()} is a group here and a class in "
                "another place; give one of them another name."
            )
    return places


def _check_names(path, places, classes):
    """Raise UserError if classes are missing from the file."""
    missing = [name for name in classes if name not in places]
    if not missing:
        return
    unknown = [name for name in places if name not in classes]
    near = difflib.get_close_matches(missing[0], unknown, n=1) or unknown
    hint = f" (line {places[near[0]][1]} has {near[0]!r}, which is no class)" if near else ""
    more = f" and {len(missing) - 1} more of {len(classes)}" if len(missing) > 1 else ""
    raise UserError(
        f"--hierarchy={path}: lacks the class {missing[0]!r}{more}{hint}; add what is missing."
    )


def _of_classes(name, places, classes):
    """The `Hierarchy` of the classes. None if all are equally far apart."""
    paths = [places[c][0] for c in classes]
    common = _n_common(paths)
    in_order = sorted(classes, key=list(places).index)
    tops = dict.fromkeys((*places[c][0], c)[common] for c in in_order)
    hierarchy = Hierarchy(name, list(classes), [path[common:] for path in paths], list(tops))
    distances = hierarchy.distances()
    off_diagonal = distances[~np.eye(len(distances), dtype=bool)]
    return hierarchy if np.ptp(off_diagonal) > 0 else None


def _n_common(paths):
    """Length of the common beginning of all paths."""
    n = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        n += 1
    return n

"""Hierarchies of classes: the super-classes that people put the classes of a data set into.

A file of one has a line for each group: the group, in the groups that it is part of, and after a
colon its classes. A class may stand under a group that has groups of its own; `#` begins a line
that is a comment. The known ones, in `known/`, are such files.

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
        name: of the known one or of its file.
        classes: names, in the order of labels.
        paths: of each class, the groups above it from the topmost to its own. What all classes
            have in common is left out.
        super_classes: the topmost groups; a class in no group counts as one.
    """

    name: str
    classes: Sequence[str]
    paths: Sequence[tuple]
    super_classes: Sequence[str]

    @property
    def super_labels(self):
        """Number of the super-class of each class, (n_classes,)."""
        tops = [(*path, name)[0] for name, path in zip(self.classes, self.paths, strict=True)]
        return np.array([self.super_classes.index(top) for top in tops])

    def distances(self):
        """Distance of every two classes, (n_classes, n_classes): the height of their lowest common
        ancestor, which is the number of steps from it down to its lowest class (Bertinetto et al.
        2020, arXiv 1912.09393). With one layer of super-classes: 1 within, 2 across."""
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
    """The hierarchy of --hierarchy; without it the known one of the data set, or one that knows all
    of its classes by name; None if there is none.

    Raises:
        UserError: the file is missing, wrong, or does not fit the classes.
    """
    if settings.hierarchy is not None:
        found = _read(Path(settings.hierarchy))
        _check_names(settings.hierarchy, found, classes)
        hierarchy = _of_classes(settings.hierarchy, found, classes)
        if hierarchy is None:
            raise UserError(
                f"--hierarchy={settings.hierarchy}: puts every two of the {len(classes)} classes "
                "equally far apart; put some of them together."
            )
        return hierarchy
    paths = sorted(KNOWN.glob("*.txt"), key=lambda path: (path.stem != settings.dataset, path.stem))
    for path in paths:
        found = _read(path)
        if set(classes) <= set(found):
            return _of_classes(path.stem, found, classes)
    return None


def known_classes(name):
    """Names of the classes in a known hierarchy, in alphabetical order."""
    return sorted(_read(KNOWN / f"{name}.txt"))


def _read(path):
    """Class -> (groups above it, number of its line), in the order of the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"--hierarchy={path}: {error.strerror}; name a file of lines as animals: cat, dog."
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"--hierarchy={path}: is no text; name a file of lines as animals: cat, dog."
        ) from None
    found = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--hierarchy={path}: line {number}"
        group, colon, names = line.partition(":")
        groups = [part.strip() for part in group.split("/")] if group.strip() else []
        names = [name.strip() for name in names.split(",")]
        if not colon or not any(names):
            raise UserError(f"{where}: {line!r} should be a group and its classes, as a/b: c, d.")
        if not all(groups) or not all(names):
            raise UserError(f"{where}: a name is missing between two commas or slashes.")
        for name in names:
            if name in found:
                raise UserError(
                    f"{where}: {name} stands in line {found[name][1]} already; a class has one "
                    "place."
                )
            found[name] = tuple(groups), number
    return found


def _check_names(path, found, classes):
    missing = [name for name in classes if name not in found]
    if not missing:
        return
    others = [name for name in found if name not in classes]
    near = difflib.get_close_matches(missing[0], others, n=1) or others
    hint = f" (line {found[near[0]][1]} has {near[0]!r}, which is none)" if near else ""
    more = f" and {len(missing) - 1} more of {len(classes)}" if len(missing) > 1 else ""
    raise UserError(
        f"--hierarchy={path}: lacks the class {missing[0]!r}{more}{hint}; add what is missing."
    )


def _of_classes(name, found, classes):
    """The `Hierarchy` of the classes; None if it tells no two of them nearer than others."""
    paths = [found[c][0] for c in classes]
    common = _n_common(paths)
    in_order = sorted(classes, key=list(found).index)
    tops = dict.fromkeys((*found[c][0], c)[common] for c in in_order)
    hierarchy = Hierarchy(name, list(classes), [path[common:] for path in paths], list(tops))
    distances = hierarchy.distances()
    off_diagonal = distances[~np.eye(len(distances), dtype=bool)]
    return hierarchy if np.ptp(off_diagonal) > 0 else None


def _n_common(paths):
    """How many groups all the paths begin with alike."""
    n = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        n += 1
    return n

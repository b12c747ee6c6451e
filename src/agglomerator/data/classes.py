"""Classes by their names: those of a data set beside those that a network has learned."""

import copy
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassMap:
    """The labels that a run gives to the classes of its data set.

    Attributes:
        names: of the classes of the run, in the order of its labels.
        labels: label of each class of the data set, in the data set's order.
    """

    names: tuple
    labels: tuple

    def apply(self, images):
        """A data set (`labels`, `classes`) with the labels of the run; the images are shared."""
        relabelled = copy.copy(images)
        relabelled.labels = torch.as_tensor(self.labels)[images.labels]
        relabelled.classes = list(self.names)
        return relabelled


def match(known, found):
    """Where each class of a data set stands among known ones.

    Names are equal if their letters and digits are, in upper or lower case: a folder cannot be
    called T-shirt/top. Folders named 0, 1, 2, ... stand for the known classes in their order, if
    there are as many.

    Args:
        known: names of a network's classes, in the order of its labels.
        found: names of a data set's classes.

    Returns:
        Indices into `known`, one for each of `found`; None if one of these is not known.

    Example:
        >>> match(["T-shirt/top", "Bag"], ["bag", "T-shirt_top"])
        [1, 0]
    """
    for form in (str, _letters):
        places = {form(name): i for i, name in enumerate(known)}
        wanted = [form(name) for name in found]
        distinct = len(places) == len(known) and len(set(wanted)) == len(wanted)
        if distinct and all(name in places for name in wanted):
            return [places[name] for name in wanted]
    if len(found) == len(known) and are_numbers(found):
        return [int(name) for name in found]
    return None


def are_numbers(names):
    """Whether the names are 0, 1, 2, ... in any order, as 00, 01, 02 too."""
    return all(name.isdecimal() for name in names) and sorted(map(int, names)) == list(
        range(len(names))
    )


def _letters(name):
    return "".join(c for c in name.casefold() if c.isalnum())

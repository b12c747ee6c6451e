"""Classes by name: which class of a network is which class of a data set."""

import copy
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassMap:
    """The labels that a run gives to the classes of its data set.

    Attributes:
        names: of the run's classes, in the order of the run's labels.
        labels: the run's label of each class of the data set, in the data set's order.
    """

    names: tuple
    labels: tuple

    def apply(self, images):
        """A copy of a data set with the run's `labels` and `classes`. It shares the images."""
        relabelled = copy.copy(images)
        relabelled.labels = torch.as_tensor(self.labels)[images.labels]
        relabelled.classes = list(self.names)
        return relabelled


def match(known, names):
    """Find the classes of a data set among the classes of a network.

    Names match if their letters and digits do, whatever their case: no folder can be called
    T-shirt/top. Folders named 0, 1, 2, ... are the known classes in order, if there are as many.

    Args:
        known: names of the network's classes, in the order of its labels.
        names: of the data set's classes.

    Returns:
        An index into `known` for each of `names`. None if any of them is not known.

    Example:
        >>> match(["T-shirt/top", "Bag"], ["bag", "T-shirt_top"])
        [1, 0]
    """
    for form in (str, _letters):
        indices = {form(name): i for i, name in enumerate(known)}
        forms = [form(name) for name in names]
        distinct = len(indices) == len(known) and len(set(forms)) == len(forms)
        if distinct and all(name in indices for name in forms):
            return [indices[name] for name in forms]
    if len(names) == len(known) and are_numbers(names):
        numbers = map(int, known) if are_numbers(known) else range(len(known))
        indices = {number: i for i, number in enumerate(numbers)}
        return [indices[int(name)] for name in names]
    return None


def are_numbers(names):
    """Whether the names are 0, 1, 2, ... in any order. They may begin with zeros, as 00, 01, 02."""
    return all(name.isdecimal() for name in names) and sorted(map(int, names)) == list(
        range(len(names))
    )


def _letters(name):
    return "".join(c for c in name.casefold() if c.isalnum())

"""Classes by name: which class of a network is which class of a data set."""

import copy
from dataclasses import dataclass

import torch

from agglomerator.data import registry
from agglomerator.util.errors import UserError
from agglomerator.util.terminal import say

SHOWN = 5  # class names in a message


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


def map_classes(settings, start, found, use, goes_on):
    """The `ClassMap` of a data set onto the classes of a checkpoint.

    A line says how names differ.

    Args:
        settings: of the run.
        start: the checkpoint.
        found: names of the data set's classes.
        use: "train", "test" or "freeze".
        goes_on: whether the run goes on with the checkpoint's training.

    Returns:
        None if the checkpoint has other classes.

    Raises:
        UserError: these need to be the same.
    """
    names, n_known = start.class_names, start.settings["n_classes"]
    where, classifies = f"{settings.dataset} ({settings.data_dir})", settings.classifies
    if names is None and len(found) == n_known:
        if registry.entry_of(settings).classes is None:
            say(f"{start.name} does not name its classes: they are taken in the folders' order.")
        return ClassMap(found, tuple(range(n_known)))
    places = match(names or (), found)
    whole = places is not None and len(found) == n_known
    if whole or (places is not None and classifies and use != "train"):
        if not whole:
            say(f"{where} has {len(found)} of the {n_known} classes of {start.name}.")
        elif are_numbers(found) and not are_numbers(names):
            say(f"The classes 0, 1, ... of {where} are taken for {_shown(names)}, in this order.")
        elif places != sorted(places):
            say(f"The classes of {where} are mapped by name to the order of {start.name}.")
        return ClassMap(names, tuple(places))
    of_start = f"those of {start.name} are {_shown(names) if names else n_known}"
    if goes_on:
        raise UserError(
            f"--resume_training: {where} has the classes {_shown(found)}; {of_start}. Without this "
            "flag training begins from its weights, with a new classifier."
        )
    if use == "test" and classifies:
        raise UserError(
            f"--load_checkpoint_dir={start.name}: cannot name the classes {_shown(found)} of "
            f"{where}; {of_start}. Rename the folders, or train a new classifier by --supervise."
        )
    if use == "train":
        say(f"A new classifier for the {len(found)} classes of {where}; {of_start}.")
    elif classifies:
        say(f"{where} has other classes: they are told by the nearest class mean; {of_start}.")
    return None


def _shown(names):
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

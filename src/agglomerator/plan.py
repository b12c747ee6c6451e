"""What a run takes from its checkpoint: settings, classes, and which images are held out."""

from dataclasses import dataclass

from agglomerator.config import SPLIT_SETTINGS, Settings, UserError
from agglomerator.data import registry
from agglomerator.data.classes import ClassMap, match
from agglomerator.runs import checkpoints
from agglomerator.util.terminal import say

SHOWN = 5  # class names in a message


@dataclass(frozen=True)
class Plan:
    """How a run begins.

    Attributes:
        settings: in force.
        class_map: `ClassMap` with the labels of the run; None for those of the data set.
        split_seed: decides which training images are held out.
        own_classifier: the checkpoint's classifier knows the classes of the run; if not, training
            begins with a new one, and freeze takes class means in its place.
    """

    settings: Settings
    class_map: ClassMap | None
    split_seed: int
    own_classifier: bool = True


def resolve(settings, given, start, use):
    """The `Plan` of a run. Says in a line what the checkpoint decides against the flags.

    Args:
        settings: of the command line, with the stage to run.
        given: names of the settings that the user gave.
        start: the checkpoint to begin from, or None.
        use: "train", "test", "freeze" or "islands".

    Raises:
        UserError: flags, data set and checkpoint contradict each other.
    """
    if start is None:
        settings = registry.complete(settings, given)
        return Plan(settings, None, settings.seed)
    asked = settings
    settings = checkpoints.complete(settings, given, start)
    _tell_normalization(asked, given, start)
    if use == "islands":
        return Plan(settings.replace(n_classes=start.settings["n_classes"]), None, settings.seed)
    found = registry.classes_of(settings)
    known = start.settings["n_classes"]
    if "n_classes" in given and asked.n_classes not in (len(found), known):
        raise UserError(
            f"--n_classes={asked.n_classes}: {settings.dataset} has {len(found)} classes; use "
            f"--n_classes={len(found)}."
        )
    class_map = _map_classes(settings, start, found, use)
    own = class_map is not None
    new = use == "train" and not own
    settings = settings.replace(n_classes=len(found) if new else known)
    settings, split_seed = _split(settings, asked, given, start, use)
    return Plan(settings, class_map, split_seed, own)


def _map_classes(settings, start, found, use):
    """The `ClassMap` of a data set with classes `found` onto those of the checkpoint; None if they
    are others."""
    names, n_known = start.class_names, start.settings["n_classes"]
    stage, where = settings.stage, f"{settings.dataset} ({settings.data_dir})"
    if names is None and len(found) == n_known:
        if registry.entry_of(settings).classes is None:
            say(f"{start.name} does not name its classes: they are taken in the folders' order.")
        return ClassMap(found, tuple(range(n_known)))
    places = match(names or (), found)
    whole = places is not None and len(found) == n_known
    classifies = stage != "contrastive"
    if whole or (places is not None and classifies and use != "train"):
        if not whole:
            say(f"{where} has {len(found)} of the {n_known} classes of {start.name}.")
        elif places != sorted(places):
            say(f"The classes of {where} are mapped by name to the order of {start.name}.")
        return ClassMap(names, tuple(places))
    of_start = f"those of {start.name} are {_shown(names) if names else n_known}"
    if use == "train" and settings.resume_training and start.stage == stage:
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


def _split(settings, asked, given, start, use):
    """(settings, split_seed): which images are held out follows the checkpoint if it is of the same
    training images."""
    if use == "test" and settings.stage != "contrastive":
        return settings, settings.seed
    if start.split_seed is None:
        return settings, settings.seed
    there, dataset = start.training_images, start.settings.get("dataset")
    if (
        dataset != settings.dataset
        if there is None
        else there != registry.training_images(settings)
    ):
        say(
            f"{start.name} learned from other images than the training images of "
            f"{settings.dataset} ({settings.data_dir}): --seed and --val_share of this run divide "
            "them, and some that are held out may be among those it learned from."
        )
        return settings, settings.seed
    share = start.settings.get("val_share", settings.val_share)
    before = {"seed": start.split_seed, "val_share": share}
    for name in SPLIT_SETTINGS:
        if name in given and getattr(asked, name) != before[name]:
            say(
                f"--{name}={getattr(asked, name)}: the images held out stay those of {start.name}, "
                f"by --{name}={before[name]}."
            )
    return settings.replace(val_share=share), start.split_seed


def _tell_normalization(asked, given, start):
    before = start.settings.get("normalization")
    if "normalization" in given and before is not None and asked.normalization != before:
        say(f"--normalization={asked.normalization}: {start.name} was trained by that of {before}.")


def _shown(names):
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

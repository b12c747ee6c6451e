"""The network and the data of a plan."""

import dataclasses

import pytorch_lightning as pl
import torch

from agglomerator.config import INPUT_SETTINGS, MODEL_SETTINGS
from agglomerator.data.module import ImageDataModule
from agglomerator.model.agglomerator import Agglomerator
from agglomerator.runs import checkpoints
from agglomerator.util.errors import UserError


def build_network(plan, training=False):
    """The network of a plan, with the weights of its checkpoint if there is one.

    Args:
        plan: from `resolve`.
        training: a classifier that does not know the classes of the run is replaced by a new one;
            that --compile can work is seen to.

    Raises:
        UserError: the weights do not fit the settings, or nothing can be compiled here.
    """
    settings = plan.settings
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    if plan.start is None:
        checkpoints.check_size(settings)
        model = Agglomerator(**dataclasses.asdict(settings))
    else:
        wanted = {name: getattr(settings, name) for name in (*MODEL_SETTINGS, *INPUT_SETTINGS)}
        n_classes = wanted.pop("n_classes")
        new = training and not plan.own_classifier
        model = checkpoints.build(plan.start, n_classes if new else None, **wanted)
    if training and settings.compile:
        check_compiler()
    return model


def build_data(plan):
    """The data of a plan, downloaded; the test set is read."""
    data = ImageDataModule(plan.settings, plan.class_map, plan.split_seed)
    data.prepare_data()
    data.setup()
    return data


def check_compiler():
    """Raises UserError if nothing can be compiled here."""
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--compile: nothing can be compiled here ({reason}); install a C++ compiler as g++, "
            "or leave the flag out."
        ) from None

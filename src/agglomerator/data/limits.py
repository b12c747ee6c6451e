"""How much of a split a run uses: --limit_train, --limit_val and --limit_test."""

import math

import torch

from agglomerator.util.errors import UserError
from agglomerator.util.random import seeded_generator


def n_batches(settings, name, batches):
    """How many of the batches --limit_<name> leaves: a number of batches, or a share of them.

    Raises:
        UserError: the share is less than one batch.
    """
    limit = getattr(settings, f"limit_{name}")
    if isinstance(limit, int):
        return min(limit, batches)
    if limit > 0 and batches and int(limit * batches) == 0:
        raise UserError(
            f"--limit_{name}={limit}: less than one of {batches} batches; use a number of "
            f"batches, like --limit_{name}=1."
        )
    return int(limit * batches)


def chosen(settings, name, n_images):
    """Which of a split's images --limit_<name> leaves, drawn by --seed: indices (N,), in order.

    Raises:
        UserError: less than one batch is left.
    """
    n = n_batches(settings, name, math.ceil(n_images / settings.batch_size)) * settings.batch_size
    if n >= n_images:
        return torch.arange(n_images)
    drawn = torch.randperm(n_images, generator=seeded_generator(settings.seed, n_images))
    return drawn[:n].sort().values

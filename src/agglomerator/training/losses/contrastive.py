"""The supervised contrastive loss, over all processes as if they were one batch."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from agglomerator.util.distributed import gather, rank
from agglomerator.util.precision import upcast, without_autocast

TILE = 2**26  # similarities at once; there are as many as the square of the global batch


def supervised_contrastive_loss(embedding, labels, temperature=0.07, across_processes=True):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, L_out of equation 2).

    Every view is an anchor. Its positives are all other views of its class, its negatives all
    views of other classes, in every process. The loss of anchor i is

        -(tau / 0.07) * mean over positives p of log softmax_j(z_i . z_j / tau) at p,  j != i

    and the mean is over all anchors that have a positive. Each process returns the sum over its
    own anchors, divided by the mean number of anchors of a process. DistributedDataParallel takes
    the mean of the gradients, and so gets the gradient of the whole batch. A large batch is
    compared in tiles of anchors, which the backward pass computes again.

    Args:
        embedding: (N, contr_dim), z, rows of unit length; the same N in every process.
        labels: (N,) integers.
        temperature: tau. The factor tau / 0.07 is as published.
        across_processes: False to compare the views of this process alone.

    Returns:
        The loss, a scalar of float32, or of float64 if the embedding is. It is 0 if no view has a
        positive.

    Example:
        >>> embedding = torch.eye(3)[[0, 1, 0, 1]]
        >>> supervised_contrastive_loss(embedding, torch.tensor([0, 1, 0, 1])) < 1e-5
        tensor(True)
    """
    embedding = upcast(embedding)
    all_embeddings, all_labels = embedding, labels
    if across_processes:
        all_embeddings, all_labels = gather(embedding), gather(labels)
    first = rank() * len(embedding) if across_processes else 0
    itself = torch.arange(first, first + len(embedding), device=labels.device)[:, None]  # (N, 1)

    anchors, others = (embedding, labels, itself), (all_embeddings, all_labels, temperature)
    total, n_anchors = compare_in_tiles(anchors, others)
    if across_processes:
        n_anchors = gather(n_anchors[None]).mean()
    return -(temperature / 0.07) * total / n_anchors.where(n_anchors > 0, 1)


def compare_anchors(embedding, labels, itself, all_embeddings, all_labels, temperature):
    """Compare some anchors with all views.

    Args:
        embedding, labels: (A, contr_dim) and (A,), of the anchors.
        itself: (A, 1), the number of each anchor among the views.
        all_embeddings, all_labels: (M, contr_dim) and (M,), of all views.
        temperature: tau.

    Returns:
        (total, n_anchors): the sum over anchors of the mean over positives of the log softmax, and
        how many anchors have a positive; scalars of the embedding's dtype.
    """
    with without_autocast(embedding.device):
        logits = embedding @ all_embeddings.mT / temperature  # (A, M)
    log_prob = logits.scatter(1, itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == all_labels).scatter(1, itself, False)
    n_positives = positive.sum(1)  # (A,)
    per_anchor = log_prob.masked_fill(~positive, 0).sum(1) / n_positives.clamp(min=1)
    return per_anchor.sum(), (n_positives > 0).sum().to(embedding.dtype)


def compare_in_tiles(anchors, others):
    """The same as `compare_anchors(*anchors, *others)`, a tile of anchors at a time."""
    rows = max(TILE // len(others[0]), 1)
    if len(anchors[0]) <= rows:
        return compare_anchors(*anchors, *others)
    tiles = [
        checkpoint(compare_anchors, *tile, *others, use_reentrant=False, preserve_rng_state=False)
        for tile in zip(*(x.split(rows) for x in anchors), strict=True)
    ]
    return [sum(parts) for parts in zip(*tiles, strict=True)]


def prototype_loss(embedding, labels, prototypes, temperature=0.07):
    """Cross-entropy of the cosines to one learned vector per class (NormFace, Wang et al. 2017,
    arXiv 1704.06369, section 3.3).

    Args:
        embedding: (N, contr_dim), rows of unit length.
        labels: (N,) integers.
        prototypes: (n_classes, contr_dim), rows of any length.
        temperature: of the cosines. The loss has the factor temperature / 0.07, as the contrastive
            loss has.

    Returns:
        The mean over N, a scalar of float32, or of float64 if the embedding is.

    Example:
        >>> prototype_loss(torch.eye(2), torch.tensor([0, 1]), 5 * torch.eye(2)) < 1e-5
        tensor(True)
    """
    embedding = upcast(embedding)
    with without_autocast(embedding.device):
        cosines = embedding @ F.normalize(upcast(prototypes), dim=1).mT  # (N, n_classes)
    return temperature / 0.07 * F.cross_entropy(cosines / temperature, labels)

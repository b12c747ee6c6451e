"""The supervised contrastive loss, over all processes as if they were one batch."""

import torch

from agglomerator.util.distributed import gather, rank
from agglomerator.util.precision import upcast, without_autocast


def supervised_contrastive_loss(embedding, labels, temperature=0.07, across_processes=True):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, L_out of equation 2).

    Every view is an anchor; its positives are all other views of its class, its negatives all
    other views, of every process. Anchors without a positive are left out of the mean. In each
    process the value is the sum over its own anchors, divided by the number of anchors that a
    process has on average: the mean over processes, which is what DistributedDataParallel makes of
    the gradients, is the loss of the whole batch.

    Args:
        embedding: (N, contr_dim), rows of unit length; the same N in every process.
        labels: (N,) integers.
        temperature: tau; the loss is scaled by tau / 0.07, as published.
        across_processes: False to look at the views of this process alone.

    Returns:
        The loss, a scalar of float32, or of float64 if the embedding is.
    """
    embedding = upcast(embedding)
    others, other_labels = embedding, labels
    if across_processes:
        others, other_labels = gather(embedding), gather(labels)
    first = rank() * len(embedding) if across_processes else 0
    itself = torch.arange(first, first + len(embedding), device=labels.device)

    with without_autocast(embedding.device):
        similarity = embedding @ others.mT / temperature
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)
    log_prob = similarity.log_softmax(1)
    positive = (labels[:, None] == other_labels).scatter(1, itself[:, None], False)
    n_positives = positive.sum(1)
    per_anchor = log_prob.masked_fill(~positive, 0).sum(1) / n_positives.clamp(min=1)
    anchors = (n_positives > 0).sum().to(embedding.dtype)
    if across_processes:
        anchors = gather(anchors[None]).mean()
    return -(temperature / 0.07) * per_anchor.sum() / anchors.where(anchors > 0, 1)

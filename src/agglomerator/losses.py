"""The supervised contrastive loss, over all processes as if they were one batch."""

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a process's rows is the sum over all processes."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x):
    """Rows of x (N, ...) of all processes, in the order of ranks: (world * N, ...)."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Gather.apply(x)
    return x


def supervised_contrastive_loss(embedding, labels, temperature=0.07, across_processes=True):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, L_out of equation 2).

    Every view is an anchor; its positives are all other views of its class, its negatives all
    other views, of every process. Anchors without a positive are left out of the mean. In each
    process the value is the mean over its own anchors: the mean over processes, which is what
    DistributedDataParallel makes of the gradients, is the loss of the whole batch.

    Args:
        embedding: (N, contr_dim), rows of unit length; the same N in every process.
        labels: (N,) integers.
        temperature: tau; the loss is scaled by tau / 0.07, as published.
        across_processes: False to look at the views of this process alone.

    Returns:
        The loss, a float32 scalar.
    """
    embedding = embedding.float()
    others, other_labels = embedding, labels
    if across_processes:
        others, other_labels = gather(embedding), gather(labels)
    rank = dist.get_rank() if len(others) > len(embedding) else 0
    itself = torch.arange(len(embedding), device=labels.device) + rank * len(embedding)

    similarity = embedding @ others.mT / temperature
    similarity = similarity.scatter(1, itself[:, None], -torch.inf)
    log_prob = similarity.log_softmax(1)
    positive = (labels[:, None] == other_labels).scatter(1, itself[:, None], False)
    n_positives = positive.sum(1)
    per_anchor = log_prob.masked_fill(~positive, 0).sum(1) / n_positives.clamp(min=1)
    return -(temperature / 0.07) * per_anchor.sum() / (n_positives > 0).sum().clamp(min=1)

"""What the processes of one training share: gathered rows, BatchNorm over the whole batch.

All of it works on any device and backend, has exact gradients, and costs nothing in one process.
"""

import torch
import torch.distributed as dist
from torch import nn

from agglomerator.util.precision import upcast

LOST = "gloo", "Connection closed by peer", "Timed out"  # gloo raises plain RuntimeErrors


def n_processes():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if n_processes() > 1 else 0


def leave_process_group():
    """Wait for the other processes, then leave the group: from here on each works alone."""
    if n_processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Rows of all processes. The gradient of a process's rows is summed over all processes."""

    @staticmethod
    def forward(ctx, x):
        ctx.rows = slice(rank() * len(x), (rank() + 1) * len(x))
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(x):
    """Rows of all processes in the order of ranks: (N, ...) -> (processes * N, ...)."""
    return _Gather.apply(x) if n_processes() > 1 else x


def greatest(number, device):
    """The greatest of the processes' integers. With several processes this waits for the device."""
    if n_processes() == 1:
        return number
    return int(gather(torch.tensor([number], device=device)).max())


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes as if they were one batch.

    All batches must have the same size. torch's own SyncBatchNorm refuses tensors on a CPU.
    """

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        processes = n_processes()
        if not self.training or processes == 1:
            return super().forward(x)
        wide = upcast(x)
        own = torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0))  # (2, C)
        variances, means = gather(own[None]).unbind(1)  # each (processes, C)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)
        with torch.no_grad():
            n = processes * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (n / max(n - 1, 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def is_fault_of_others(error):
    """Whether a RuntimeError says that another process has ended or does not answer."""
    return n_processes() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)
    )

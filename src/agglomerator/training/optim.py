"""Optimizers: Muon for the matrices of a network, AdamW for its other weights; and the schedule."""

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from agglomerator.data.transforms import send
from agglomerator.model.columns import LevelLinear

PADDING = 3.0  # a batch of matrices has at most so many numbers for each that is of a matrix
QUINTIC = 3.4445, -4.7750, 2.0315  # of the polynomial that brings singular values near 1


def can_fuse(device):
    """Whether AdamW moves all weights on a device by one operation."""
    return device.type != "mps"


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for the
    weights of linear maps and convolutions, AdamW for all other parameters.

    A matrix W with momentum M = U diag(s) V^T takes the step

        W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, columns)) U V^T

    in which all directions are about as long. The factor makes the step as large as one of AdamW,
    so that both take the same learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2). The
    momentum is Nesterov's, with the first beta of AdamW. Weights must be whole in each process.

    Args:
        model: the network. Its parameters that require a gradient learn. The filters of a
            convolution are the rows of a matrix; a `LevelLinear` holds a matrix for each level.
        **options: of `torch.optim.AdamW`.
    """

    def __init__(self, model, **options):
        n_matrices = {}  # of a weight; 0 of those that AdamW moves
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | LevelLinear):
                n_matrices[module.weight] = getattr(module, "levels", 1)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = []
        for number in sorted({*n_matrices.values()} | {0}):
            params = [each for each in learning if n_matrices.get(each, 0) == number]
            groups.append({"params": params, "matrices": number})
        super().__init__([group for group in groups if group["params"]], **options)
        self._batches = {}  # of `Batch`, by the weights that have a gradient

    def __setstate__(self, state):
        # AdamW's own would ask every parameter for its number of steps; those of Muon have none.
        torch.optim.Optimizer.__setstate__(self, state)
        self._batches = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Move all parameters by one step.

        Like fused AdamW it heeds what loss scaling sets: it divides gradients by `grad_scale`, and
        leaves everything as it is if `found_inf` is 1.

        Args:
            closure: computes the loss and its gradients anew, if given.

        Returns:
            What the closure returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for options in _alike(group for group in self.param_groups if group["matrices"]):
            self._step_matrices(*options)
        super().step()
        return loss

    def _step_matrices(self, weights, numbers, rate, beta, decay):
        """Move `weights`, of which each holds so many matrices as `numbers` says.

        All become one long vector, and matrices of like shapes one batch: a GPU takes as long to
        begin an operation as to do it for a small matrix.
        """
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        grad = torch.cat([weight.grad.reshape(-1) for weight in weights])
        momentum = torch.cat([each.reshape(-1) for each in momenta])
        if getattr(self, "grad_scale", None) is not None:
            grad = grad / self.grad_scale
        if getattr(self, "found_inf", None) is not None:
            overflow = self.found_inf.reshape(()) > 0  # a factor, for a branch would wait for it
            grad, finite = grad.masked_fill(overflow, 0), (~overflow).to(grad.dtype)
            beta, rate = 1 - (1 - beta) * finite, rate * finite
        momentum = momentum.lerp(grad, 1 - beta)
        ahead = grad.lerp(momentum, beta)
        step = torch.empty_like(ahead)
        for batch in self._batches_of(weights, numbers):
            batch.step(ahead, step)
        step *= rate
        torch._foreach_copy_(momenta, _parts(momentum, momenta))
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_sub_(weights, _parts(step, weights))
        for weight in weights:
            weight.grad = None  # so that AdamW leaves it out

    def _batches_of(self, weights, numbers):
        key = tuple(map(id, weights))
        if key not in self._batches:
            matrices = [matrix.shape for w, k in zip(weights, numbers, strict=True)
                        for matrix in w.flatten(1).chunk(k)]  # fmt: skip
            self._batches[key] = batches_of(matrices, weights[0].device)
        return self._batches[key]


def _alike(groups):
    """The weights that have a gradient, the matrices in each, and the options, for groups of one
    learning rate, momentum and weight decay."""
    found = {}
    for group in groups:
        weights, numbers = found.setdefault(
            (group["lr"], group["betas"][0], group["weight_decay"]), ([], [])
        )
        weights += [weight for weight in group["params"] if weight.grad is not None]
        numbers += [group["matrices"]] * (len(weights) - len(numbers))
    return [(*both, *options) for options, both in found.items() if both[0]]


def _parts(vector, tensors):
    """A long vector cut up into the shapes of tensors."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class Batch:
    """Matrices of like shapes in a long vector.

    Args:
        places: where each begins, its rows and its columns.
        device: of the vector.
    """

    def __init__(self, places, device):
        self.places = places
        self.shape = len(places), *(max(map(side, places)) for side in (_short, _long))
        sizes = torch.tensor([0.2 * _long(place) ** 0.5 for place in places])
        self.sizes = send(sizes.view(-1, 1, 1), device)

    def step(self, ahead, step):
        """Write the steps of the matrices into `step`: their directions in `ahead`, all about as
        long as a step of AdamW."""
        padded = torch.zeros(self.shape, dtype=torch.bfloat16, device=ahead.device)
        torch._foreach_copy_(self._of_rows(padded), self._of_vector(ahead))
        steps = orthogonal(padded) * self.sizes
        torch._foreach_copy_(self._of_vector(step), self._of_rows(steps))

    def _of_vector(self, vector):
        return [vector[at : at + r * c].view(r, c) for at, r, c in self.places]

    def _of_rows(self, padded):
        pairs = zip(padded, self.places, strict=True)
        return [x[:r, :c] if r <= c else x[:c, :r].mT for x, (_, r, c) in pairs]


def _short(place):
    return min(place[1:])


def _long(place):
    return max(place[1:])


def batches_of(shapes, device):
    """Put matrices that lie one after another in a vector into few batches. Zeros fill up the
    smaller ones: they change no singular value but add zeros. A CPU begins an operation in no time:
    there, equal shapes alone share a batch.

    Args:
        shapes: (rows, columns) of the matrices.
        device: of the vector.

    Returns:
        A list of `Batch`.
    """
    places, at = [], 0
    for rows, columns in shapes:
        places.append((at, rows, columns))
        at += rows * columns
    batches, size = [], 0
    padding = 1.0 if device.type == "cpu" else PADDING
    for place in sorted(places, key=lambda place: (_short(place), _long(place)), reverse=True):
        numbers = place[1] * place[2]
        if batches:
            joined = [*batches[-1], place]
            padded = len(joined) * max(map(_short, joined)) * max(map(_long, joined))
        if not batches or padded > padding * (size + numbers):
            batches.append([])
            size = 0
        batches[-1].append(place)
        size += numbers
    return [Batch(batch, device) for batch in batches]


def orthogonal(matrices, iterations=5):
    """Bring the singular values of matrices near 1 and keep their singular vectors.

    Newton-Schulz iterations in bfloat16 bring singular values to between 0.7 and 1.2 or so, but
    for those far below the greatest of their matrix.

    Args:
        matrices: (k, rows, columns).
        iterations: of Newton-Schulz.

    Returns:
        (k, rows, columns), bfloat16.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class OneCycle(OneCycleLR):
    """The one-cycle schedule, which holds its last value after its end. If a resumed training has
    another number of steps per epoch, as on another number of processes, it continues at the same
    share of the schedule."""

    def load_state_dict(self, state):
        own = {name: vars(self)[name] for name in ("total_steps", "_schedule_phases")}
        share = own["total_steps"] / state["total_steps"]
        super().load_state_dict(state)
        done = self.last_epoch if share == 1 else round(self.last_epoch * share)
        vars(self).update(own, last_epoch=done)

    def step(self, epoch=None):
        if self.last_epoch + 1 < self.total_steps:
            super().step(epoch)

"""Muon for the matrices of a network, AdamW for all its other weights."""

import torch
from torch import nn

from agglomerator.model.columns import LevelLinear

QUINTIC = 3.4445, -4.7750, 2.0315  # of the polynomial that brings singular values near 1


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

    def __setstate__(self, state):
        # AdamW's own would ask every parameter for its number of steps; those of Muon have none.
        torch.optim.Optimizer.__setstate__(self, state)

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
        for group in self.param_groups:
            if group["matrices"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._step_matrices(weight, group)
                        weight.grad = None  # so that AdamW leaves it out
        super().step()
        return loss

    def _step_matrices(self, weight, group):
        state, beta = self.state[weight], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        grad, finite = weight.grad, 1.0
        if getattr(self, "grad_scale", None) is not None:
            grad = grad / self.grad_scale
        if getattr(self, "found_inf", None) is not None:
            overflow = self.found_inf.reshape(()) > 0  # a factor, for a branch would wait for it
            grad, finite = grad.masked_fill(overflow, 0), (~overflow).to(grad.dtype)
        momentum = state["momentum"].lerp_(grad, (1 - beta) * finite)
        n_matrices = group["matrices"]
        nesterov = grad.lerp(momentum, beta).reshape(n_matrices, len(weight) // n_matrices, -1)
        size = 0.2 * max(nesterov.shape[1:]) ** 0.5
        step = size * orthogonal(nesterov).to(weight.dtype).view_as(weight)
        weight -= group["lr"] * finite * (step + group["weight_decay"] * weight)


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
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

"""Muon: weight matrices take steps of one size in all directions, all else learns by AdamW."""

import torch
from torch import nn

from agglomerator.model.columns import LevelLinear

QUINTIC = 3.4445, -4.7750, 2.0315  # of the polynomial that brings singular values near 1


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for the
    weights of linear maps and convolutions, AdamW for all other parameters.

    The step of a matrix is that of its momentum's singular vectors with singular values near 1,
    times 0.2 sqrt(max(rows, columns)), which makes it as large as one of AdamW with the same
    learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2); the first beta of AdamW is the
    momentum, as Nesterov has it. Weights must be whole in each process.

    Args:
        model: its parameters that require a gradient learn. The filters of a convolution are the
            rows of a matrix; a `LevelLinear` holds a matrix a level.
        **options: of `torch.optim.AdamW`.
    """

    def __init__(self, model, **options):
        matrices = {}
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | LevelLinear):
                matrices[module.weight] = getattr(module, "levels", 1)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = []
        for number in sorted({*matrices.values()} | {0}):
            params = [each for each in learning if matrices.get(each, 0) == number]
            groups.append({"params": params, "matrices": number})
        super().__init__([group for group in groups if group["params"]], **options)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's asks all parameters for a step

    @torch.no_grad()
    def step(self, closure=None):
        """A step of all parameters. Like fused AdamW it heeds what loss scaling sets: `grad_scale`,
        and `found_inf`, 1 for a step that is passed over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._step(weight, group)
                        weight.grad = None  # AdamW passes over it
        super().step()
        return loss

    def _step(self, weight, group):
        state, momentum = self.state[weight], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        grad, sound = weight.grad, 1.0
        if getattr(self, "grad_scale", None) is not None:
            grad = grad / self.grad_scale
        if getattr(self, "found_inf", None) is not None:
            found = self.found_inf.reshape(()) > 0
            grad, sound = grad.masked_fill(found, 0), (~found).to(grad.dtype)
        mean = state["momentum"].lerp_(grad, (1 - momentum) * sound)
        rows = weight.shape[0] // group["matrices"]
        ahead = grad.lerp(mean, momentum).reshape(group["matrices"], rows, -1)
        size = 0.2 * max(ahead.shape[1:]) ** 0.5
        step = size * orthogonal(ahead).to(weight.dtype).view_as(weight)
        weight -= group["lr"] * sound * (step + group["weight_decay"] * weight)


def orthogonal(matrices, iterations=5):
    """Matrices with the same singular vectors, and singular values from 0.7 to 1.2 or so, for those
    not far below the greatest, by Newton-Schulz iterations in bfloat16.

    matrices (k, rows, columns) -> the same shape, bfloat16.
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

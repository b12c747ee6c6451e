"""What the weights of a network show of its settings."""

import math
import re

import torch

from agglomerator.model.attention import distances
from agglomerator.util.errors import UserError

# Buffers that a network computes anew, or does without.
MASK, DERIVED = "attention.non_local_mask", ("non_local_mask", "num_batches_tracked")


def shapes_show(weights):
    """The settings that the shapes of a state dict show, and the radius, which its mask does.

    Those that leave no trace (iters, denoise_iter, dropout, consensus_self; the radius, where the
    mask is left out; the grid, where neither norms nor a mask show it) are missing; image_size is
    taken for four times the grid, the published tokenizer's stride.

    Raises:
        UserError: the mask is that of no radius.
        KeyError, ValueError, ...: the network is another one.
    """
    names = [name for name in weights if name.startswith("image_to_tokens.0.block.")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    convs = [weights[name].shape for name in names if weights[name].dim() == 4]
    levels, patch_dim = weights["init_levels"].shape
    patch_size = round((patch_dim / convs[-1][0]) ** 0.5)
    n_columns = _n_columns(weights)
    channels = convs[0][0]
    coarser = {name.split(".")[5] for name in names if ".down." in name}
    if coarser:
        tokenizer, depth = "pyramid", len(coarser)
    elif any(re.match(r"image_to_tokens\.0\.block\.\d+\.block\.", name) for name in weights):
        tokenizer, depth = "residual", (len(convs) - 3) // 2
    elif len(convs) > 2 and convs[1][0] != channels:
        tokenizer, depth = "vgg", len(convs) - 4
    else:
        tokenizer, depth = "convmlp", len(convs)
    settings = {
        "patch_size": patch_size,
        "patch_dim": patch_dim,
        "levels": levels,
        "n_channels": convs[0][1],
        "tokenizer_width": None if channels == convs[-1][0] // 2 else channels,
        "tokenizer": tokenizer,
        "tokenizer_depth": depth,
        "column_norm": "places" if "bottom_up.net.1.weight" in weights else "plain",
        "prototypes": "prototypes" in weights,
        "pretraining": "masked" if "masked.patch" in weights else "contrastive",
        "consensus": _consensus(weights),
        "n_classes": weights["classification_head_from_contr.2.weight"].shape[0],
    }
    if n_columns is not None:
        grid = round(n_columns**0.5) * patch_size
        settings |= {"conv_image_size": grid, "image_size": 4 * grid}
    if MASK in weights:
        settings["local_consensus_radius"] = _radius(weights[MASK], round(n_columns**0.5))
    return settings | _head(weights, n_columns, patch_dim)


def _n_columns(weights):
    """The number of columns; None where neither norms nor a mask show it."""
    norm = weights.get("bottom_up.net.1.weight")
    if norm is not None:
        return norm.shape[0]
    return weights[MASK].shape[-1] if MASK in weights else None


def _consensus(weights):
    sign = weights.get("agreement_attention.sign")
    if sign is None:
        return "published"
    return "agreement_repel" if sign > 0 else "agreement"


def _head(weights, n_columns, patch_dim):
    """What the weights show of the head; nothing of one that is none of the project's."""
    norms = [name for name in weights if name.startswith("contrastive_head.")]
    linear = "classification_head_from_contr.0.weight"
    if norms == ["contrastive_head.0.weight", "contrastive_head.0.bias"]:
        return {"head": "mean"} if weights[linear].dim() == 1 else {}
    windowed = weights.get("contrastive_head.11.weight")  # its indices are one higher
    if windowed is not None:
        return {"head": "dissimilarity", "contr_dim": windowed.shape[0]}
    first, last = (weights.get(f"contrastive_head.{i}.weight") for i in (5, 10))
    if first is None or last is None or first.dim() != 2 or last.dim() != 2:
        return {}
    hidden, width = first.shape
    if n_columns is not None and hidden == width == n_columns * patch_dim:
        return {"head": "flatten", "contr_dim": last.shape[0]}
    return {"head": "grid", "contr_dim": last.shape[0], "head_side": math.isqrt(width // patch_dim)}


def _radius(mask, grid_size):
    """The roundest of the radii that give a mask, (1, n, n)."""
    if mask.shape == (1, grid_size**2, grid_size**2) and not mask.all():
        near, apart = ~mask[0].bool(), distances(grid_size)
        reach = apart[near].max()
        if torch.equal(near, apart <= reach):
            beyond = apart[~near].min().item() if mask.any() else math.inf
            reach = max(reach.item(), 0.1)  # 0 stands for no limit
            rounded = (math.ceil(reach * 10**digits) / 10**digits for digits in range(10))
            radius = next(radius for radius in rounded if radius < beyond)
            return int(radius) if radius.is_integer() else radius
    raise UserError(f"{MASK} is the mask of no radius; write the checkpoint anew.")


def same_mask(one, other, grid_size):
    """Whether two radii let the same columns attend to each other."""
    if one == other or not all(isinstance(radius, int | float) for radius in (one, other)):
        return one == other
    near = distances(grid_size)[0]
    masks = [near > (radius if 0 < radius < 2 * grid_size else math.inf) for radius in (one, other)]
    return torch.equal(*masks)

"""The equations of the model (arXiv 2203.03282) written a second time, as directly as possible.

Functions of the published state dict; levels are channel groups (B, K * d, n), and every linear map
is one grouped 1x1 convolution."""

import math

import torch
import torch.nn.functional as F


def tokens(weights, flags, images, train=False, statistics=None):
    """(B, C, H, W) -> (B, d, n). In training, statistics receives what BatchNorm would store."""
    g, p = flags["conv_image_size"], flags["patch_size"]
    stride = math.ceil(flags["image_size"] / g)
    conv_stride, pool_stride = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]

    def convolution(x, i, stride=1, block="", kept=None):
        at = f"image_to_tokens.0.block.{block}"
        x = F.conv2d(x, weights[f"{at}{i}.weight"], stride=stride, padding=1)
        if kept:  # the largest of each square
            x, i = F.max_pool2d(x, kept, ceil_mode=True), i + 1
        norm = f"{at}{i + 1}."
        mean, var = (weights[norm + k].clone() for k in ("running_mean", "running_var"))
        x = F.batch_norm(x, mean, var, weights[norm + "weight"], weights[norm + "bias"], train)
        if statistics is not None:
            statistics.update({norm + "running_mean": mean, norm + "running_var": var})
        return x.relu()

    def pool(x):
        return F.max_pool2d(x, 3, pool_stride, 1)

    depth = flags.get("tokenizer_depth", 3)
    kind = flags.get("tokenizer")
    x = convolution(images, 0, 1 if kind == "vgg" else conv_stride)
    if kind == "vgg":
        x = convolution(convolution(x, 3, kept=conv_stride), 7)
        x = convolution(x, 10, kept=pool_stride)
        for i in range(14, 14 + 3 * depth, 3):
            x = convolution(x, i)
    elif kind == "residual":
        x = pool(convolution(x, 3))
        for i in range(7, 7 + depth):
            x = x + convolution(convolution(x, 0, block=f"{i}.block."), 3, block=f"{i}.block.")
        x = convolution(x, 7 + depth)
    else:
        for i in range(3, 3 * depth, 3):
            x = convolution(x, i)
        x = pool(x)  # (B, E, G, G)
    s = g // p
    columns = [
        x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1)
        for i in range(s)
        for j in range(s)
    ]
    return torch.stack(columns, dim=2)


def column_net(weights, name, x, groups, activation):
    """(B, groups * d, n) -> the same."""
    for i, function in ((1, activation), (4, lambda y: y)):
        norm, linear = f"{name}.net.{i}.", f"{name}.net.{i + 1}."
        x = F.layer_norm(x, x.shape[-1:], weights[norm + "weight"], weights[norm + "bias"])
        x = F.conv1d(x, weights[linear + "weight"], weights[linear + "bias"], groups=groups)
        x = function(x)
    return x


def consensus(level, flags):
    """(B, d, n) -> (B, d, n)."""
    d, n = level.shape[1:]
    s = math.isqrt(n)
    key = level / level.norm(dim=1, keepdim=True)
    scores = torch.einsum("bdi,bdj->bij", level, key) / math.sqrt(d)
    if flags.get("consensus_temperature"):
        scores = torch.einsum("bdi,bdj->bij", key, key) / flags["consensus_temperature"]
    if not flags["consensus_self"]:
        scores = torch.where(torch.eye(n, dtype=torch.bool), torch.tensor(-5e-4).to(scores), scores)
    radius = flags["local_consensus_radius"]
    if radius > 0:
        far = [[math.dist(divmod(i, s), divmod(j, s)) > radius for j in range(n)] for i in range(n)]
        scores = scores.masked_fill(torch.tensor(far), -torch.inf)
    return torch.einsum("bij,bdj->bdi", scores.softmax(-1), level)


def agreement_aware(level, number, flags):
    """(B, d, n) -> (B, d, n), pair by pair; `number` is that of the level."""
    n = level.shape[2]
    s = math.isqrt(n)
    threshold = 0 if number == 0 else -0.2
    sign = {"agreement": -1, "agreement_repel": 1}[flags["consensus"]]
    columns, new = level.unbind(2), []
    lengths = [column.norm(dim=1) for column in columns]
    for i, one in enumerate(columns):
        total, like, unlike = 0, 0, 0
        for j, other in enumerate(columns):
            if math.dist(divmod(i, s), divmod(j, s)) <= 3:
                cosine = ((one * other).sum(1) / (lengths[i] * lengths[j]))[:, None]  # (B, 1)
                weight = cosine.exp() * (cosine >= threshold)
                total, like = total + weight, like + weight * other
                unlike = unlike + (cosine < threshold) * cosine * other / n
        new.append(like / total + sign * unlike)
    return torch.stack(new, 2)


def states(weights, flags, images, train=False, statistics=None, start=None):
    """(T + 1, B, n, K, d)."""
    levels, d = weights["init_levels"].shape
    iters = 2 * levels if flags["iters"] is None else flags["iters"]
    token = tokens(weights, flags, images, train, statistics)
    n = token.shape[2]
    level = [weights["init_levels"][k][None, :, None].expand(len(images), d, n) for k in
             range(levels)]  # fmt: skip
    if start is not None:
        level = [start[:, :, k].transpose(1, 2) for k in range(levels)]
    found = [level]
    for _ in range(iters):
        below = torch.cat([token, *level[:-1]], 1)
        bottom_up = column_net(weights, "bottom_up", below, levels, F.gelu).split(d, 1)
        above = torch.cat(level[:0:-1], 1)  # from the top level down to level 1
        top_down = column_net(weights, "top_down", above, levels - 1, torch.sin).split(d, 1)
        new = []
        for k in range(levels):
            total = weights["wl"] * level[k] + weights["wBU"] * bottom_up[k]
            total = total + weights["wA"] * consensus(level[k], flags)
            if k < levels - 1:
                total = total + weights["wTD"] * top_down[levels - 2 - k]
            count = 3 if k == levels - 1 else 4
            if flags.get("consensus", "published") != "published":
                total = total + weights["wAA"] * agreement_aware(level[k], k, flags)
                count += 1
            new.append(total / count)
        level = new
        found.append(level)
    return torch.stack([torch.stack(level, 2).permute(0, 3, 2, 1) for level in found])


def embedding(weights, all_states, flags):
    """States (T + 1, B, n, K, d) -> (B, contr_dim), without dropout."""

    head = flags.get("head", "flatten")
    first = 1 if head == "dissimilarity" else 0

    def norm(x, i):
        name = f"contrastive_head.{i + first}."
        return F.layer_norm(x, x.shape[-1:], weights[name + "weight"], weights[name + "bias"])

    def linear(x, i):
        name = f"contrastive_head.{i + first}."
        return F.linear(x, weights[name + "weight"], weights[name + "bias"])

    x = all_states[flags["denoise_iter"]][:, :, -1]
    x = norm(window_sums(x) if head == "dissimilarity" else x, 0)
    if head == "mean":
        x = x.mean(1)
        return x / x.norm(dim=1, keepdim=True)
    x = grid_means(x, flags) if head == "grid" else x.flatten(1)
    x = norm(F.gelu(norm(linear(norm(x, 3), 5), 6)), 8)
    x = linear(x, 10)
    return x / x.norm(dim=1, keepdim=True)


def grid_means(columns, flags):
    """(B, n, d) -> (B, d * side * side), channel first; cells overlap where they must."""
    s, side = math.isqrt(columns.shape[1]), flags.get("head_side", 4)
    columns = columns.unflatten(1, (s, s))
    ranges = [slice(i * s // side, -(-(i + 1) * s // side)) for i in range(side)]
    means = [columns[:, rows, cols].mean((1, 2)) for rows in ranges for cols in ranges]
    return torch.stack(means, 2).flatten(1)


def window_sums(columns):
    """(B, n, d) -> (B, n / 16, d), window by window of 4x4 columns."""
    s = math.isqrt(columns.shape[1])
    columns, sums = columns.unflatten(1, (s, s)), []
    for row in range(0, s, 4):
        for column in range(0, s, 4):
            window = [columns[:, row + i, column + j] for i in range(4) for j in range(4)]
            unit = [one / one.norm(dim=1, keepdim=True) for one in window]
            weights = [sum((1 - (a * b).sum(1)).exp() for b in unit) for a in unit]  # each (B,)
            greatest = torch.stack(weights).amax(0)
            weighted = zip(weights, window, strict=True)
            sums.append(sum((w / greatest)[:, None] * one for w, one in weighted))
    return torch.stack(sums, 1)


def logits(weights, embedded):
    name = "classification_head_from_contr."
    if name + "0.weight" in weights and weights[name + "0.weight"].dim() == 1:
        scale, shift = weights[name + "0.weight"], weights[name + "0.bias"]
        x = F.layer_norm(embedded, embedded.shape[-1:], scale, shift)
        return F.linear(x, weights[name + "2.weight"], weights[name + "2.bias"])
    hidden = F.gelu(F.linear(embedded, weights[name + "0.weight"], weights[name + "0.bias"]))
    return F.linear(hidden, weights[name + "2.weight"], weights[name + "2.bias"])


def contrastive_loss(embedded, labels, temperature):
    """The supervised contrastive loss, pair by pair."""
    similarity = embedded @ embedded.T / temperature
    anchors = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            log_sum = similarity[i, others].logsumexp(0)
            anchors.append(sum(similarity[i, j] - log_sum for j in positives) / len(positives))
    return -(temperature / 0.07) * sum(anchors) / len(anchors)

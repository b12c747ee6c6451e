"""The Agglomerator network: the column loop, and all its parts put together.

Garau, Bisagno, Sambugaro, Conci, "Interpretable part-whole hierarchies and conceptual-semantic
relationships in neural networks", CVPR 2022, arXiv 2203.03282; Hinton, "How to represent part-whole
hierarchies in a neural network", arXiv 2102.12627. Read the parts in the order of the data:
tokenizer.py, columns.py, attention.py (local_attention.py), the loop here, heads.py.

Shapes: B images, G cells on a side of the tokenizer's grid, p cells on a side of a patch,
S = G / p columns on a side, n = S * S columns (row-major), K levels of width d, T iterations.
The interface has a state as (B, n, K, d). The loop has it as a list of K levels (d, B, n), for
linear maps are over d and norms over n; a level that has not heard of the images yet is the same
for all of them, (d, 1, n). `to_levels` and `to_state` change one into the other.

Published weights load as they are: the names of parameters, and so the indices of modules in each
`nn.Sequential`, are those of the published state dict.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from agglomerator.config import Settings
from agglomerator.model.attention import ConsensusAttention
from agglomerator.model.columns import ColumnNet, Sine
from agglomerator.model.heads import classifier, contrastive_head
from agglomerator.model.tokenizer import Tokenizer


def to_levels(state):
    """(B, n, K, d) -> list of K levels (d, B, n)."""
    return list(state.permute(2, 3, 0, 1))


def to_state(levels, n_images):
    """List of K levels (d, B, n) or (d, 1, n) -> (B, n, K, d)."""
    return torch.stack([level.expand(-1, n_images, -1) for level in levels]).permute(2, 3, 0, 1)


class Agglomerator(nn.Module):
    """Images -> columns of levels that come to agree -> embedding -> classes.

    Args:
        **flags: settings by the names of the flags, with their defaults (`Settings`). Those that
            do not concern the network are accepted and have no effect here.

    Raises:
        UserError: the settings do not make a network; the message names values that do.
        TypeError: there is no setting of that name.

    Example:
        >>> model = Agglomerator(patch_dim=64, image_size=28, conv_image_size=7, n_channels=1)
        >>> model(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 512])
    """

    def __init__(self, **flags):
        super().__init__()
        self.settings = s = Settings(**flags)
        d, n = s.patch_dim, s.n_columns
        self.image_to_tokens = nn.Sequential(
            Tokenizer(s),  # (B, E, G, G)
            Rearrange("b e (i p) (j q) -> (e p q) b (i j)", p=s.patch_size, q=s.patch_size),
        )
        self.init_levels = nn.Parameter(torch.randn(s.levels, d))
        places = s.column_norm == "places"
        self.bottom_up = ColumnNet(s.levels, d, n, nn.GELU(), places=places)
        # Stored in reversed order: the first group of weights serves level K-2, the last level 0.
        self.top_down = ColumnNet(s.levels - 1, d, n, Sine(), reverse=True, places=places)
        self.attention = ConsensusAttention(
            s.grid_size, s.consensus_self, s.local_consensus_radius, s.consensus_temperature
        )
        self.wl, self.wBU, self.wTD, self.wA = (nn.Parameter(torch.tensor(0.25)) for _ in range(4))
        self.contrastive_head = contrastive_head(s)
        self.classification_head_from_contr = classifier(s)

    def plain_iteration(self, levels, tokens):
        """One iteration of the column loop, as the paper has it, all from the old state:

            L_k <- (w_l L_k + w_BU BU_k(L_k-1) + w_TD TD_k(L_k+1) + w_A A(L_k)) / c_k

        K levels (d, B, n), tokens (d, B, n) -> K levels. Below level 0 are the tokens, above the
        top level is nothing; c_k counts what a level receives, 4, on top 3.
        """
        below, above, new = [tokens, *levels[:-1]], levels[1:], []
        for k, level in enumerate(levels):
            received = [self.wl * level, self.wBU * self.bottom_up.plain(below[k], k)]
            if k < len(above):
                received.append(self.wTD * self.top_down.plain(above[k], k))
            received.append(self.wA * self.attention.plain(level))
            new.append(sum(received) / len(received))
        return new

    def iterate(self, levels, from_tokens, keep, alike=False):
        """The same as `plain_iteration`, with less work: K levels -> K levels.

        Args:
            from_tokens: (d, B, n), w_BU BU_0(tokens) / c_0, the same in every iteration.
            keep: how many of the highest levels are wanted; the others become None. The head reads
                the top one, which depends on one more below it for each iteration that remains.
            alike: the columns of the state are all equal, as they are at first. The norm of equal
                columns passes no gradient on, but in floats it passes rounding noise, magnified.
        """
        top = len(levels) - 1
        source = [level.detach() for level in levels] if alike else levels
        new = [None] * len(levels)
        for k in range(len(levels) - keep, len(levels)):
            c = 4 if k < top else 3
            total = self.bottom_up(source[k - 1], k, self.wBU / c) if k else from_tokens
            if k < top:
                total = total + self.top_down(source[k + 1], k, self.wTD / c)
            total = torch.addcmul(total, levels[k], self.wl / c)
            new[k] = torch.addcmul(total, self.attention(levels[k]), self.wA / c)
        return new

    def _loop(self, images, keeps, levels=None):
        """The states before and after every iteration, each a list of K levels. `keeps` has what
        each iteration keeps; `levels` is the state to go on from, None for the initial one."""
        tokens = self.image_to_tokens(images.to(self.init_levels.dtype))  # (d, B, n)
        from_tokens = self.bottom_up(tokens, 0, self.wBU / 4)
        iterate = self.iterate
        if self.settings.recompute:
            iterate = partial(checkpoint, iterate, use_reentrant=False, preserve_rng_state=False)
        initial = self.init_levels[:, :, None, None].expand(-1, -1, 1, tokens.shape[2])
        states = [list(initial) if levels is None else levels]
        for t, keep in enumerate(keeps):
            states.append(iterate(states[-1], from_tokens, keep, alike=t == 0 and levels is None))
        return states

    def states(self, images, iters=None, levels=None):
        """The state after every iteration, from which islands are drawn: (T + 1, B, n, K, d).

        Args:
            images: (B, n_channels, image_size, image_size).
            iters: number of iterations T; None for that of the settings.
            levels: (B, n, K, d), a state to go on from instead of the initial one.
        """
        keeps = [self.settings.levels] * (self.settings.n_iters if iters is None else iters)
        states = self._loop(images, keeps, None if levels is None else to_levels(levels))
        return torch.stack([to_state(state, len(images)) for state in states])

    def forward(self, images):
        """images (B, n_channels, image_size, image_size) -> embedding (B, contr_dim), unit length,
        without computing levels that it does not depend on."""
        last = self.settings.denoise_iter % (self.settings.n_iters + 1)
        keeps = [min(self.settings.levels, last - t) for t in range(last)]
        return self._embed(self._loop(images, keeps)[-1], len(images))

    def with_levels(self, images):
        """The same embedding with every level computed, and the last state (B, n, K, d)."""
        states = self._loop(images, [self.settings.levels] * self.settings.n_iters)
        embedding = self._embed(states[self.settings.denoise_iter], len(images))
        return embedding, to_state(states[-1], len(images))

    def _embed(self, levels, n_images):
        top = to_state(levels[-1:], n_images)[:, :, 0]  # (B, n, d)
        return F.normalize(self.contrastive_head(top), dim=-1)

    def classify(self, images):
        """images (B, n_channels, image_size, image_size) -> logits (B, n_classes)."""
        return self.classification_head_from_contr(self(images))

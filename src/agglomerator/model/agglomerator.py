"""The Agglomerator network: tokenizer, column nets, consensus, the column loop, heads.

Garau, Bisagno, Sambugaro, Conci, "Interpretable part-whole hierarchies and conceptual-semantic
relationships in neural networks", CVPR 2022, arXiv 2203.03282; Hinton, "How to represent part-whole
hierarchies in a neural network", arXiv 2102.12627. Read it from top to bottom.

Shapes: B images, G cells on a side of the tokenizer's grid, p cells on a side of a patch,
S = G / p columns on a side, n = S * S columns (row-major), K levels of width d. In the loop a state
is a list of its levels from the bottom: (d, B, n), or (d, 1, n) of those that have not heard of the
images yet.
Parameters bear the names of the published state dict, so that published weights load as they are.
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
from agglomerator.model.heads import contrastive_head
from agglomerator.model.tokenizer import Tokenizer


def _columns(state, n_images):
    """List of K levels -> (B, n, K, d)."""
    return torch.stack([level.expand(-1, n_images, -1) for level in state]).permute(2, 3, 0, 1)


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
            Tokenizer(
                s.n_channels,
                s.token_channels,
                s.tokenizer_stride,
                s.tokenizer,
                s.tokenizer_width,
                s.tokenizer_depth,
            ),
            Rearrange("b e (i p) (j q) -> (e p q) b (i j)", p=s.patch_size, q=s.patch_size),
        )
        self.init_levels = nn.Parameter(torch.randn(s.levels, d))
        self.bottom_up = ColumnNet(s.levels, d, n, nn.GELU())
        # Stored in reversed order: the first group of weights serves level K-2, the last level 0.
        self.top_down = ColumnNet(s.levels - 1, d, n, Sine(), reverse=True)
        self.attention = ConsensusAttention(
            s.grid_size, s.consensus_self, s.local_consensus_radius, s.consensus_temperature
        )
        self.wl = nn.Parameter(torch.tensor(0.25))
        self.wBU = nn.Parameter(torch.tensor(0.25))
        self.wTD = nn.Parameter(torch.tensor(0.25))
        self.wA = nn.Parameter(torch.tensor(0.25))
        self.contrastive_head = contrastive_head(s.head, n, d, s.contr_dim, s.dropout, s.head_side)
        self.classification_head_from_contr = nn.Sequential(
            nn.Linear(s.contr_dim, s.contr_dim), nn.GELU(), nn.Linear(s.contr_dim, s.n_classes)
        )

    def _share(self, weight, level):
        """A contribution's factor: its learned weight over how many the level receives."""
        return weight / (3 if level == self.settings.levels - 1 else 4)

    def iterate(self, state, parts, keep, alike=False):
        """One iteration of the column loop, all four contributions from the old state.

        Args:
            state: list of K levels. Those that are kept and the one below them are read.
            parts: (d, B, n), what level 0 receives from the tokens, the same in every iteration.
            keep: how many of the highest levels are wanted. The head reads the top one alone, and
                a level depends on one more below it for each iteration that remains.
            alike: the columns of the state are all equal, as they are at first.

        Returns:
            The new state, with None for levels that are not kept.
        """
        top = len(state) - 1
        # The norm of equal columns passes no gradient on, but in floats rounding noise, large.
        source = [level.detach() for level in state] if alike else state
        new = [None] * len(state)
        for k in range(top + 1 - keep, top + 1):
            own = state[k]
            total = self.bottom_up(source[k - 1], k, self._share(self.wBU, k)) if k else parts
            if k < top:
                total = total + self.top_down(source[k + 1], k, self._share(self.wTD, k))
            total = torch.addcmul(total, own, self._share(self.wl, k))
            new[k] = torch.addcmul(total, self.attention(own), self._share(self.wA, k))
        return new

    def _loop(self, images, keeps, state=None):
        """The column loop over images.

        Args:
            keeps: how many of the highest levels to keep, for every iteration in turn.
            state: list of K levels to go on from; None for the initial one.

        Returns:
            The states before and after every iteration.
        """
        tokens = self.image_to_tokens(images.to(self.init_levels.dtype))  # (d, B, n)
        parts = self.bottom_up(tokens, 0, self._share(self.wBU, 0))
        iterate = self.iterate
        if self.settings.recompute:
            iterate = partial(
                checkpoint, self.iterate, use_reentrant=False, preserve_rng_state=False
            )
        initial = self.init_levels[:, :, None, None].expand(-1, -1, 1, tokens.shape[2])
        states = [list(initial) if state is None else state]
        for t, keep in enumerate(keeps):
            states.append(iterate(states[-1], parts, keep, alike=t == 0 and state is None))
        return states

    def states(self, images, iters=None, levels=None):
        """The state after every iteration, from which islands are drawn.

        Args:
            images: (B, n_channels, image_size, image_size).
            iters: number of iterations; None for that of the settings.
            levels: (B, n, K, d), a state to go on from instead of the initial one.

        Returns:
            (iters + 1, B, n, K, d), the state gone on from first.
        """
        keeps = [self.settings.levels] * (self.settings.n_iters if iters is None else iters)
        start = None if levels is None else list(levels.permute(2, 3, 0, 1))
        states = self._loop(images, keeps, start)
        return torch.stack([_columns(state, len(images)) for state in states])

    def forward(self, images):
        """images (B, n_channels, image_size, image_size) -> embedding (B, contr_dim), unit length.

        Levels that the state that feeds the head does not depend on are not computed.
        """
        last = self.settings.denoise_iter % (self.settings.n_iters + 1)
        keeps = [min(self.settings.levels, last - t) for t in range(last)]
        return self._embed(self._loop(images, keeps)[-1], len(images))

    def with_levels(self, images):
        """images -> the embedding, as `forward` returns it, and all levels of the last state,
        (B, n, K, d)."""
        states = self._loop(images, [self.settings.levels] * self.settings.n_iters)
        embedding = self._embed(states[self.settings.denoise_iter], len(images))
        return embedding, _columns(states[-1], len(images))

    def _embed(self, state, n_images):
        top = state[-1].expand(-1, n_images, -1).permute(1, 2, 0)  # (B, n, d)
        return F.normalize(self.contrastive_head(top), dim=-1)

    def classify(self, images):
        """images (B, n_channels, image_size, image_size) -> logits (B, n_classes)."""
        return self.classification_head_from_contr(self(images))

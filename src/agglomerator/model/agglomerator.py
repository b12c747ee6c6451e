"""The Agglomerator network: the column loop, and all its parts put together.

Garau, Bisagno, Sambugaro, Conci, "Interpretable part-whole hierarchies and conceptual-semantic
relationships in neural networks", CVPR 2022, arXiv 2203.03282; Hinton, "How to represent part-whole
hierarchies in a neural network", arXiv 2102.12627. Read the parts in the order of the data:
tokenizer.py, columns.py, attention.py (tiles.py), the loop here, heads.py.

Shapes: B images, G cells on a side of the tokenizer's grid, p cells on a side of a patch,
S = G / p columns on a side, n = S * S columns (row-major), K levels of width d, T iterations.
The interface has a state as (B, n, K, d). The loop has it as a `State`, in blocks of levels
(k, d, B, n), for linear maps are over d and norms over n.

Published weights load as they are: the names of parameters, and so the indices of modules in each
`nn.Sequential`, are those of the published state dict.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from agglomerator.config import Settings
from agglomerator.model.agreement_attention import AgreementAttention
from agglomerator.model.attention import ConsensusAttention
from agglomerator.model.columns import ColumnNet, Sine
from agglomerator.model.heads import classifier, contrastive_head
from agglomerator.model.masked import MaskedPatches
from agglomerator.model.tokenizer import Tokenizer
from agglomerator.util.errors import UserError


@dataclass
class State:
    """The levels of the columns, from the lowest that is wanted to the top.

    Attributes:
        blocks: a list of one or two pairs: the number of a level, and this and following levels,
            (k, d, B, n). Levels that have not heard of the images yet are the same for all of them,
            (k, d, 1, n).
        heard: how many levels have heard of the images, counted from level 0.
    """

    blocks: list
    heard: int

    @staticmethod
    def of(levels):
        """The state of (B, n, K, d)."""
        return State([(0, levels.permute(2, 3, 0, 1))], levels.shape[2])

    @property
    def top(self):
        """The highest level, (d, B, n) or (d, 1, n)."""
        return self.blocks[-1][1][-1]

    @property
    def bottom(self):
        """The lowest level, (d, B, n) or (d, 1, n)."""
        return self.blocks[0][1][0]

    def whole(self, n_images):
        """(B, n, K, d)."""
        blocks = [block.expand(-1, -1, n_images, -1) for _, block in self.blocks]
        return torch.cat(blocks).permute(2, 3, 0, 1)


def add_up(runs, lowest, heard, levels):
    """The sum of runs of levels, as a `State`.

    Args:
        runs: pairs of the number of a level and tensors (k, d, B or 1, n) for this and following
            levels.
        lowest, heard: the lowest level, and the first that has not heard of the images.
        levels: K.
    """
    ends = {end for first, run in runs for end in (first, first + len(run))}
    ends = sorted(ends | {lowest, max(lowest, heard), levels})
    sums = {}
    for first, run in runs:
        cuts = [end for end in ends if first <= end <= first + len(run)]
        parts = run.split([b - a for a, b in pairwise(cuts)]) if len(cuts) > 2 else [run]
        for at, part in zip(cuts, parts, strict=False):
            sums[at] = sums[at] + part if at in sums else part
    blocks = []
    for begin, end in ((lowest, heard), (max(lowest, heard), levels)):
        parts = [sums[at] for at in ends if begin <= at < end]
        if parts:
            blocks.append((begin, torch.cat(parts) if len(parts) > 1 else parts[0]))
    return State(blocks, heard)


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
        names, self.agreement_attention = ["wl", "wBU", "wTD", "wA"], None
        if s.consensus != "published":
            repel = s.consensus == "agreement_repel"
            self.agreement_attention = AgreementAttention(s.grid_size, repel)
            names.append("wAA")
        self.mixing_names, most = tuple(names), len(names)
        for name in names:
            setattr(self, name, nn.Parameter(torch.tensor(1 / most)))
        received = torch.tensor([float(most)] * (s.levels - 1) + [most - 1.0])  # c
        self.register_buffer("received", received.view(-1, 1, 1, 1), persistent=False)
        self.contrastive_head = contrastive_head(s)
        self.classification_head_from_contr = classifier(s)
        self.masked = MaskedPatches(s) if s.pretraining == "masked" else None
        self.prototypes = None
        if s.prototypes:
            drawn = torch.randn(s.n_classes, s.embedding_dim)
            self.prototypes = nn.Parameter(F.normalize(drawn, dim=-1))

    def plain_iteration(self, levels, tokens):
        """One iteration of the column loop, as the paper has it, all from the old state:

            L_k <- (w_l L_k + w_BU BU_k(L_k-1) + w_TD TD_k(L_k+1) + w_A A(L_k)) / c_k

        K levels (d, B, n), tokens (d, B, n) -> K levels. Below level 0 are the tokens, above the
        top level is nothing; c_k counts what a level receives, 4, on top 3. With a `consensus` that
        heeds agreement, w_AA AA_k(L_k) comes to it, and c_k is 5, on top 4.
        """
        below, above, new = [tokens, *levels[:-1]], levels[1:], []
        for k, level in enumerate(levels):
            received = [self.wl * level, self.wBU * self.bottom_up.plain(below[k], k)]
            if k < len(above):
                received.append(self.wTD * self.top_down.plain(above[k], k))
            received.append(self.wA * self.attention.plain(level))
            if self.agreement_attention is not None:
                received.append(self.wAA * self.agreement_attention.plain(level, k))
            new.append(sum(received) / len(received))
        return new

    def prepare(self, tokens):
        """What all iterations share, computed once from tokens (d, B, n): the scaled bottom-up and
        top-down nets, w_BU BU_0(tokens) / c_0, and w / c of what columns hold and agree on."""
        bottom_up = self.bottom_up.scaled(self.wBU / self.received)
        top_down = self.top_down.scaled(self.wTD / len(self.mixing_names))
        from_tokens = bottom_up(tokens[None], 0)  # (1, d, B, n)
        scales = [self.wl / self.received, self.wA / self.received]
        if self.agreement_attention is not None:
            scales.append(self.wAA / self.received)
        return bottom_up, top_down, from_tokens, *scales

    def iterate(self, state, shared, keep, alike=False):
        """The same as `plain_iteration`, with less work: `State` -> `State`.

        Args:
            shared: from `prepare`.
            keep: how many of the highest levels are wanted. The head reads the top one, which
                depends on one more below it for each iteration that remains.
            alike: the columns of the state are all equal, as they are at first. The norm of equal
                columns passes no gradient on, but in floats it passes rounding noise, magnified.
        """
        bottom_up, top_down, from_tokens, wl, wA, *wAA = shared
        K = self.settings.levels
        lowest = K - keep
        runs = [] if lowest else [(0, from_tokens)]
        for first, block in state.blocks:
            source, end = block.detach() if alike else block, first + len(block)
            below = source[max(lowest - 1 - first, 0) : len(block) - (end == K)]
            if len(below):
                at = max(first, lowest - 1) + 1
                runs.append((at, bottom_up(below, at)))
            above = source[max(lowest + 1 - first, 0) :]
            if len(above):
                runs.append((end - len(above) - 1, top_down(above, end - len(above) - 1)))
            own = block[max(lowest - first, 0) :]
            if len(own):
                at = end - len(own)
                runs.append((at, wl[at:end] * own + wA[at:end] * self.attention(own)))
                if wAA:
                    runs.append((at, wAA[0][at:end] * self.agreement_attention(own, at)))
        return add_up(runs, lowest, min(state.heard + 1, K), K)

    def _loop(self, images, keeps, state=None):
        """The `State`s before and after every iteration. `keeps` has what each iteration keeps;
        `state` is the one to go on from, None for the initial one."""
        tokens = self.image_to_tokens(images.to(self.init_levels.dtype))  # (d, B, n)
        iterate = self.iterate
        if self.settings.recompute:
            iterate = partial(checkpoint, iterate, use_reentrant=False, preserve_rng_state=False)
        initial = self.init_levels[:, :, None, None].expand(-1, -1, 1, tokens.shape[2])
        states = [State([(0, initial)], 0) if state is None else state]
        shared = self.prepare(tokens) if keeps else None
        for t, keep in enumerate(keeps):
            states.append(iterate(states[-1], shared, keep, alike=t == 0 and state is None))
        return states

    def states(self, images, iters=None, levels=None):
        """The state after every iteration, from which islands are drawn: (T + 1, B, n, K, d).

        Args:
            images: (B, n_channels, image_size, image_size).
            iters: number of iterations T; None for that of the settings.
            levels: (B, n, K, d), a state to go on from instead of the initial one.
        """
        keeps = [self.settings.levels] * self._n_iters(iters)
        states = self._loop(images, keeps, None if levels is None else State.of(levels))
        return torch.stack([state.whole(images.shape[0]) for state in states])

    def forward(self, images, iters=None):
        """images (B, n_channels, image_size, image_size) -> embedding (B, contr_dim), unit length,
        without computing levels that it does not depend on. `iters` as in `states`."""
        last = self._embedded(self._n_iters(iters))
        keeps = [min(self.settings.levels, last - t) for t in range(last)]
        return self._embed(self._loop(images, keeps)[-1], images.shape[0])

    def with_levels(self, images, iters=None):
        """The same embedding with every level computed, and the last state (B, n, K, d)."""
        states = self._loop(images, [self.settings.levels] * self._n_iters(iters))
        embedding = self._embed(states[self._embedded(len(states) - 1)], images.shape[0])
        return embedding, states[-1].whole(images.shape[0])

    def reconstruct(self, images, hidden, iters=None):
        """Predict an image of which patches are hidden, from level 0 of the last iteration.

        Args:
            images: (B, n_channels, image_size, image_size).
            hidden: (B, image_size, image_size) bool, from `MaskedPatches.draw`.
            iters: as in `states`.

        Returns:
            (pixels, states): (B, n_channels, image_size, image_size), of which those that were not
            hidden are not trained; and the T + 1 `State`s.
        """
        keeps = [self.settings.levels] * self._n_iters(iters)
        states = self._loop(self.masked.hide(images, hidden), keeps)
        return self.masked.pixels(states[-1].bottom), states

    def _n_iters(self, iters):
        """The number of iterations that is asked for. Raises UserError if it is negative."""
        if iters is not None and iters < 0:
            raise UserError(f"iters={iters}: must be at least 0.")
        return self.settings.n_iters if iters is None else iters

    def _embedded(self, n_iters):
        """The number of the state that is embedded. Raises UserError if there is none."""
        chosen = self.settings.denoise_iter
        if not -n_iters - 1 <= chosen <= n_iters:
            raise UserError(
                f"iters={n_iters}: makes the states 0 to {n_iters}, but the network embeds state "
                f"{chosen} (denoise_iter); use more iterations."
            )
        return chosen % (n_iters + 1)

    def _embed(self, state, n_images):
        top = state.top.expand(-1, n_images, -1).permute(1, 2, 0)  # (B, n, d)
        return F.normalize(self.contrastive_head(top), dim=-1)

    def classify(self, images):
        """images (B, n_channels, image_size, image_size) -> logits (B, n_classes)."""
        return self.classification_head_from_contr(self(images))

"""Looking into a network: the islands of images as arrays and as figures.

It is what a notebook uses, and what draws every picture of the program. Nothing here writes a file,
opens a window, or touches the state of matplotlib or of PyTorch's random numbers.
"""

import math
import os
from functools import cached_property

import torch
import torch.nn.functional as F

from agglomerator.data.preprocessing import Preprocessing, each_image
from agglomerator.islands import figures
from agglomerator.islands.agreement import draw_agreement
from agglomerator.islands.projection import Projection
from agglomerator.islands.scores import check_masks, score_states
from agglomerator.islands.segments import Segmenter, segment
from agglomerator.util.errors import UserError

BATCH = 32  # images that go through the network at once
TITLE = "Islands of agreement"
AROUND = (
    "Green: the column; gold: its island on each level, and below it the island's columns, their "
    "mean cosine with the column, and their share of its attention."
)


def find_islands(
    model,
    images,
    names=None,
    masks=None,
    iters=None,
    threshold=None,
    loss=None,
    projection=None,
):
    """The islands of images in a network.

    The network stays on its device and in its mode.

    Args:
        model: from `load_checkpoint`, or an `Agglomerator`.
        images: an image, a list of B images, or a batch, as for `model.preprocess`: files, Pillow
            images, or uint8 values.
        names: B names for the figures; None for those of the files, or numbers.
        masks: true segments of what the network sees of each image, its middle square: (B, S, S)
            integers by the names "parts" or "objects", or both: 0 background, 1 to 254 segments,
            255 is ignored.
        iters: iterations T; None for those of the network.
        threshold: least cosine of neighbours in an island; None for the setting of the network,
            island_threshold.
        loss: if given, or if the network has the setting island_loss, islands are found by merging
            instead.
        projection: that of other `Islands`, so that equal vectors have equal colours in both; None
            for one that fits these images.

    Returns:
        `Islands`.

    Raises:
        UserError: an argument is not as said here, or beyond the limits of its flag; a file cannot
            be read; the network does not tell how its input is prepared; states are not finite.
    """
    settings = model.settings
    if threshold is None and loss is None:
        loss = settings.island_loss
    threshold = settings.island_threshold if threshold is None else threshold
    settings.replace(island_threshold=threshold, island_loss=loss)
    preprocess = _preprocessing_of(model)
    single = each_image(images, settings.n_channels == 1)
    if names is None:
        names = [_name(image, number) for number, image in enumerate(single)]
    if len(names) != len(single):
        raise UserError(f"find_islands: {len(names)} names for {len(single)} images.")
    check_masks(masks or {}, len(single))
    batches = (single[i : i + BATCH] for i in range(0, len(single), BATCH))
    states = [finite(states_of(model, preprocess(batch), iters)) for batch in batches]
    shown = preprocess.photographs(single)
    return Islands(shown, names, torch.cat(states, 1), threshold, loss, projection, masks, model)


def _preprocessing_of(model):
    if not hasattr(model, "preprocess"):
        return Preprocessing(model.settings)
    if model.preprocess is None:
        raise UserError(
            "the checkpoint does not tell how images are to be prepared: give "
            "load_checkpoint(..., dataset=...), such as CIFAR10."
        )
    return model.preprocess


def _name(image, number):
    return os.path.basename(image) if isinstance(image, str | os.PathLike) else str(number)


def states_of(model, views, iters=None):
    """States (T + 1, B, n, K, d) of views (B, C, H, W), float32 on the CPU, in evaluation mode. The
    network is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model.states(views.to(model.init_levels.device), iters).float().cpu()
    finally:
        for module, training in modes:
            module.training = training


def finite(states):
    """States as they are. Raises UserError if a number in them is not finite."""
    if not states.isfinite().all():
        raise UserError(
            "the states of these images are not finite, and make no islands; use another "
            "checkpoint, or fewer --iters."
        )
    return states


class Islands:
    """The islands of B images: their states, what follows from these, and figures of it.

    `find_islands` makes it. B images, n = S * S columns (row-major), K levels of width d, T
    iterations. A time `t` is the number of a state: 0 is the initial one, T or -1 the last.

    Args:
        images: (B, C, H, W) uint8, or a list of B images (C, H, W) of any size, to draw.
        names: of the images.
        states: (T + 1, B, n, K, d), on the CPU.
        threshold, loss: as for `segment`. As attributes they may be changed at any time.
        projection: of the colours; None for one that fits the last states.
        masks: true segments by name, (B, H, W) integers each, such as "parts": 0 background, 255
            not scored. None if they are not known.
        model: the network; None if its attention is not asked for.
    """

    def __init__(
        self, images, names, states, threshold, loss=None, projection=None, masks=None, model=None
    ):
        self.images, self.names, self.states, self.masks = images, names, states, masks or {}
        self.threshold, self.loss, self.model = threshold, loss, model
        self._segmenters = {}
        if projection is not None:
            self.projection = projection

    @cached_property
    def projection(self):
        """The `Projection` of the colours."""
        return Projection.fit(self.states[-1])

    @property
    def iters(self):
        """T."""
        return len(self.states) - 1

    @property
    def side(self):
        """Columns on a side, S."""
        return math.isqrt(self.states.shape[2])

    def labels(self, t=-1):
        """The island of every column: an array (B, K, S, S) of integers. The label of an island is
        the index, row-major, of its first column."""
        t = self._time(t)
        if t not in self._segmenters:
            self._segmenters[t] = Segmenter(self.states[t])
        return self._segmenters[t].segment(self.threshold, self.loss).numpy()

    def colours(self, t=-1):
        """The colour of every column: an array (B, K, S, S, 3) of sRGB, from 0 to 1."""
        return self.projection.colours(self.states[t])

    def scores(self, t=-1):
        """The scores of `score_states` by name, each an array (B, K): `cosine` of neighbours,
        `number` of islands, share of columns `inside` islands of two or more; with masks also
        `parts_ari`, `parts_iou`, `objects_ari`, `objects_iou`."""
        scores = score_states(self.states[t], self.threshold, self.masks, loss=self.loss)
        return {name: score.numpy() for name, score in scores.items()}

    def cosines(self, image, column, t=-1):
        """The cosine, on each level, of every column with one column: an array (K, S, S).

        Args:
            image: number of the image.
            column: (row, column) on the grid, from 0 to S - 1.
            t: number of the state.
        """
        unit = F.normalize(self.states[t, image], dim=-1)  # (n, K, d)
        return self._on_grid((unit * unit[self._index(column)]).sum(-1).T)

    def attention(self, image, column, t=-1):
        """How much one column attends, on each level, to every other, in the iteration that follows
        state t: an array (K, S, S), each level sums to 1. It is the softmax of the network's
        consensus, within its local_consensus_radius if it has one. The arguments are those of
        `cosines`.

        Raises:
            UserError: there is no network.
        """
        if self.model is None:
            raise UserError("attention: needs the network; make the islands by find_islands.")
        weight = self.model.init_levels
        levels = self.states[t, image].permute(1, 2, 0).to(weight)[:, :, None]  # (K, d, 1, n)
        with torch.no_grad():
            rows = [self.model.attention.weights(level, self._index(column)) for level in levels]
        return self._on_grid(torch.cat(rows).flatten(1).float().cpu())

    def draw_levels(self, t=-1, title=TITLE):
        """A figure: a row for each image, with the input and its levels, lowest first, and its true
        segments where they are known. See `figures.draw_levels`."""
        states = self.states[t]
        note = self._caption(states, self.images)
        if self.masks:
            note += f"\n{figures.caption_of_masks(self.masks)}"
        arrays = self.colours(t), self.labels(t)
        return figures.draw_levels(self.images, self.names, *arrays, title, note, self.masks)

    def draw_grid(self, level=-1, t=-1, title=TITLE):
        """A figure: the borders of the islands of one level over each image, in a grid."""
        level = range(self.states.shape[3])[level]
        title = f"{title}, level {level}"
        note = figures.caption_of_lines(self.side, self.threshold, self.loss)
        labels = self.labels(t)[:, level]
        return figures.draw_grid(self.images, self.names, labels, title, note)

    def draw_iterations(self, image=0, title=TITLE):
        """A figure: how the islands of one image form; a row for each level, lowest first, over the
        iterations. See `figures.draw_iterations`."""
        states = self.states[:, image]
        labels = segment(states, self.threshold, self.loss)
        title = f"{title}: {self.names[image]}, over the iterations"
        shown, colours = self.images[image], self.projection.colours(states)
        return figures.draw_iterations(
            shown, colours, labels, title, self._caption(states, [shown])
        )

    def draw_agreement(self, image, column, t=-1, title=TITLE):
        """A figure: on each level the islands with that of one column, the cosine of every column
        with it, and its attention. The arguments are those of `cosines`."""
        title = f"{title}: {self.names[image]}, iteration {self._time(t)} of {self.iters}"
        note = figures.caption_of_lines(self.side, self.threshold, self.loss, single=False)
        return draw_agreement(*self.around(image, column, t), title, f"{AROUND}\n{note}")

    def around(self, image, column, t=-1):
        """What `draw_agreement` shows: image, column, colours, labels, cosines and attention."""
        labels, colours = self.labels(t)[image], self.projection.colours(self.states[t, image])
        both = self.cosines(image, column, t), self.attention(image, column, t)
        return self.images[image], column, colours, labels, *both

    def _caption(self, states, images):
        found_by = self.threshold, self.loss
        return figures.caption(images, states, self.projection, *found_by)

    def _time(self, t):
        """t from 0 to T."""
        return range(len(self.states))[t]

    def _index(self, column):
        """The number of a column (row, column), row-major.

        Raises:
            IndexError: it is outside the grid.
        """
        row, place = column
        if not (0 <= row < self.side and 0 <= place < self.side):
            raise IndexError(f"column {column} is outside a grid of {self.side} x {self.side}")
        return row * self.side + place

    def _on_grid(self, values):
        """(K, n) -> an array (K, S, S)."""
        return values.unflatten(-1, (self.side, self.side)).numpy()


def joined(several):
    """`Islands` of all the images of several, with their last states alone."""
    first = several[0]
    images = [image for each in several for image in each.images]
    names = [name for each in several for name in each.names]
    states = torch.cat([each.states[-1:] for each in several], 1)
    return Islands(images, names, states, first.threshold, first.loss, first.projection)

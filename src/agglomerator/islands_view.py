"""Islands of agreement: the levels of sample images as pictures that compare over a whole run."""

import time

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.backends.registry import BackendFilter, backend_registry
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

SAMPLES = 6
SECONDS = 20


class Projection:
    """A map from vectors to colours for every level, fitted once and used for all pictures.

    Vectors count by their direction, as in consensus. The three main axes of the vectors of the
    first pictures become red, green and blue. Equal vectors have equal colours in every image and
    at any time; different ones can look alike, since three axes do not hold all of a vector.
    """

    def __init__(self, mean, axes, spread):
        self.mean, self.axes, self.spread = mean, axes, spread

    @classmethod
    def fit(cls, levels):
        """Fit to the levels (B, n, K, d) of some images."""
        vectors = F.normalize(levels.double(), dim=-1).flatten(0, 1).transpose(0, 1)  # (K, B*n, d)
        mean = vectors.mean(1, keepdim=True)
        axes = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[:, :3].mT  # (K, d, 3)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = F.pad(axes * largest.sign(), (0, 3 - axes.shape[2]))
        spread = ((vectors - mean) @ axes).std(1, keepdim=True).clamp(min=1e-6)
        return cls(*(x.numpy() for x in (mean, axes, spread)))

    @classmethod
    def load(cls, path, levels, width):
        """The projection kept in a file, or None if there is none, whole, for these levels and
        width."""
        shapes = {"mean": (levels, 1, width), "axes": (levels, width, 3), "spread": (levels, 1, 3)}
        try:
            with np.load(path) as kept:
                arrays = {name: kept[name] for name in shapes}
        except Exception:  # no file, or a damaged one, which raises anything
            return None
        fits = all(arrays[name].shape == shape for name, shape in shapes.items())
        return cls(**arrays) if fits and all(a.dtype.kind == "f" for a in arrays.values()) else None

    def save(self, path):
        np.savez(path, mean=self.mean, axes=self.axes, spread=self.spread)

    def colours(self, levels):
        """levels (B, n, K, d) -> colours (K, B, n, 3) from 0 to 1."""
        vectors = F.normalize(levels.double(), dim=-1).permute(2, 0, 1, 3).numpy()
        along = (vectors - self.mean[:, None]) @ self.axes[:, None] / self.spread[:, None]
        return np.clip(0.5 + along / 5, 0, 1)


def draw(figure, images, colours, titles):
    """Draw one row an image into a figure: the input, then its levels from lowest to highest.

    Args:
        figure: matplotlib figure; what it showed before is removed.
        images: (B, C, H, W) uint8.
        colours: (K, B, n, 3), from `Projection.colours`.
        titles: of the rows.
    """
    n_levels, n_images, n_columns = colours.shape[:3]
    side = round(n_columns**0.5)
    figure.clear()
    axes = figure.subplots(n_images, n_levels + 1, squeeze=False)
    for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=255)
        axes[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center")
        for level in range(n_levels):
            axes[row, level + 1].imshow(colours[level, row].reshape(side, side, 3))
    for level in range(n_levels):
        name = {0: "\n(parts)", n_levels - 1: "\n(whole)"}.get(level, "")
        axes[0, level + 1].set_title(f"level {level}{name}", fontsize=10)
    axes[0, 0].set_title("input", fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])


class IslandsView(Callback):
    """Shows the islands of the same sample images during training, validation and test.

    On a desktop in one window that updates in place and never waits; always as files in `folder`:
    one for every validation and test, and `latest.png`, at most every 20 seconds, in between.

    Args:
        folder: for the pictures and for the projection, which later runs into the same folder use.
        stage: name of the stage, for file names.
    """

    def __init__(self, folder, stage):
        self.folder, self.stage = folder, stage
        self.figure = self.projection = None
        self.window = False
        self.drawn_at = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if time.monotonic() - self.drawn_at > SECONDS:
            self.show(trainer, module, module.data.val, "latest")
        self._update_window()

    def on_validation_end(self, trainer, module):
        name = f"{self.stage}_epoch_{trainer.current_epoch + 1:04d}"
        self.show(trainer, module, module.data.val, name)

    def on_test_end(self, trainer, module):
        self.show(trainer, module, module.data.test, f"{self.stage}_test")

    @rank_zero_only
    def show(self, trainer, module, subset, name):
        images, labels = _samples(subset, len(module.data.classes))
        levels = final_levels(module, module.data.view(images.to(module.device)))
        images = module.data.crop(images)
        if self.projection is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "projection.npz"
            self.projection = Projection.load(path, *levels.shape[2:])
            if self.projection is None:
                self.projection = Projection.fit(levels)
                self.projection.save(path)
        if self.figure is None:
            size = 1.5 + 1.5 * (levels.shape[2] + 1), 1.5 * len(images) + 0.8
            self.figure = plt.figure(figsize=size, layout="constrained")
            self.window = interactive()
            if self.window:
                plt.show(block=False)
        titles = [module.data.classes[label] for label in labels]
        draw(self.figure, images, self.projection.colours(levels), titles)
        self.figure.suptitle(f"Islands of agreement, {name.replace('_', ' ')}")
        path = self.folder / f"{name}.png"
        self.figure.savefig(path, dpi=110)
        self.figure.canvas.draw_idle()
        self._update_window()
        if name != "latest":
            for logger in trainer.loggers:
                _log_picture(logger, self.figure, path, trainer.global_step)
        self.drawn_at = time.monotonic()

    def _update_window(self):
        """Let the window draw and answer to its user, unless there is none or it was closed."""
        if self.window and plt.fignum_exists(self.figure.number):
            self.figure.canvas.flush_events()

    def teardown(self, trainer, module, stage):
        if self.figure is not None:
            plt.close(self.figure)
            self.figure = None


def final_levels(module, views):
    """Levels (B, n, K, d) after the last iteration, on the CPU, without touching the training."""
    training = module.training
    module.eval()
    with torch.no_grad():
        levels = module.model.states(views)[-1].float().cpu()
    module.train(training)
    return levels


def interactive():
    """Whether matplotlib draws into windows here."""
    return matplotlib.get_backend().lower() in backend_registry.list_builtin(
        BackendFilter.INTERACTIVE
    )


def _samples(subset, n_classes):
    """The first image of each of the first classes, at most SAMPLES: images and labels."""
    dataset, rows = subset.dataset, torch.as_tensor(list(subset.indices))
    labels = dataset.labels[rows]
    first = [(labels == c).nonzero()[0] for c in range(n_classes) if (labels == c).any()]
    return dataset[rows[torch.cat(first[:SAMPLES])]]


def _log_picture(logger, figure, path, step):
    kind = type(logger).__name__
    if kind == "WandbLogger":
        logger.log_image("islands", [str(path)], step=step)
    elif kind == "TensorBoardLogger":
        logger.experiment.add_figure("islands", figure, step, close=False)

"""The live view of islands: a window, a page in the browser, files, an animation, the logger."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.registry import BackendFilter, backend_registry
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import FSDPStrategy

from agglomerator.islands_pictures import Album, animate
from agglomerator.report import say

SAMPLES = 6
SECONDS = 20  # between two pictures, or more, so that they take no more than
SHARE = 0.02  # of the time
MOST_FRAMES = 100


class IslandsView(Callback):
    """Shows the islands of the same sample images during training, validation and test.

    A first picture before training and a last one after it; in between, no more than `SHARE` of
    the time goes into pictures. Each is written into the folder, where the last of them make an
    animation, and shown in a window or a page where there is one, which never holds up the run.

    Args:
        folder: for the pictures and for the projection, which later runs into the same folder use.
        stage: name of the stage, for file names.
        threshold: least cosine of neighbours of one island.
    """

    def __init__(self, folder, stage, threshold):
        self.album, self.stage = Album(folder, threshold), stage
        self.frames = folder / "frames" / stage
        self.window = None
        self.on = True

    def setup(self, trainer, module, stage):
        self.on = trainer.is_global_zero
        if self.on and isinstance(trainer.strategy, FSDPStrategy):
            say("--plot_islands: not while the weights lie in pieces (fsdp); --mode=islands after.")
            self.on = False

    def on_train_start(self, trainer, module):
        self.began = self.drawn_at = time.perf_counter()
        self.spent = self.last = 0.0
        self._try(self._drop_frames, trainer.global_step)
        self._show(trainer, module)

    def on_train_batch_end(self, trainer, module, *batch):
        if self._due():
            self._show(trainer, module)

    def on_validation_end(self, trainer, module):
        if self._due():
            self._show(trainer, module, log=True)

    def on_train_end(self, trainer, module):
        self._show(trainer, module, log=True)
        self._try(self._animate)

    def on_exception(self, trainer, module, exception):
        self._try(self._animate)

    def on_test_end(self, trainer, module):
        self._show(trainer, module, test=True, log=True)

    def teardown(self, trainer, module, stage):
        if self.window is not None:
            self.window.close()
            self.window = None

    def _due(self):
        """Whether a picture fits into the share of the time that is for pictures."""
        now = time.perf_counter()
        allowed = SHARE * (now - self.began)
        return now - self.drawn_at >= SECONDS and self.spent + self.last <= allowed

    def _show(self, trainer, module, test=False, log=False):
        began = time.perf_counter()
        self._try(self._draw, trainer, module, test, log)
        self.drawn_at = time.perf_counter()
        if not test:
            self.last = self.drawn_at - began
            self.spent += self.last

    def _try(self, function, *arguments):
        """Call it if this process draws. A full disk is no reason to end a training."""
        try:
            if self.on:
                function(*arguments)
        except OSError as error:
            say(f"--plot_islands: {error.filename}: {error.strerror}; no more pictures.")
            self.on = False

    def _draw(self, trainer, module, test, log):
        data = module.data
        subset = data.test if test or not len(data.val) else data.val
        images, labels = samples(subset, len(data.classes))
        states = states_of(module, data.view(images.to(module.device)))
        names = [data.classes[label] for label in labels]
        if test:
            name, when = f"{self.stage}_test", "test images"
        else:
            name, step = self.stage, trainer.global_step
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs)
            when = f"{self.stage} training, epoch {epoch}, step {step}"
            when = when if step else "before training"
        title = f"Islands of agreement, {data.settings.dataset}\n{when}"
        sheets = self.album.sheets(data.crop(images), names, states, title)
        paths = {"islands": self.album.write(name, sheets[0])}
        if not test:
            self._keep_frame(paths["islands"], trainer.global_step)
            if self.window is None and is_there_a_screen():
                self.window = Window(paths["islands"])
        if log:
            paths["iterations"] = self.album.write(f"{name}_iterations", sheets[1])
            for logger in trainer.loggers:
                log_pictures(logger, paths, trainer.global_step)

    def _frames(self):
        return sorted(self.frames.glob("[0-9]" * 10 + ".png"))

    def _drop_frames(self, step):
        """Drop those after a step: of a training that this one does not go on with."""
        for frame in self._frames():
            if int(frame.stem) > step:
                frame.unlink()

    def _keep_frame(self, picture, step):
        """Keep a picture for the animation; at most `MOST_FRAMES`, evenly over the training."""
        self.frames.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, self.frames / f"{step:010d}.png")
        frames = self._frames()
        if len(frames) > MOST_FRAMES:
            steps = [int(frame.stem) for frame in frames]
            gaps = [after - before for before, after in zip(steps[:-2], steps[2:], strict=True)]
            frames[1 + gaps.index(min(gaps))].unlink()

    def _animate(self):
        frames = self._frames()
        if len(frames) > 1:
            animate(frames, self.album.folder / f"{self.stage}.gif")


def samples(subset, n_classes):
    """The first image of each of the first classes, at most SAMPLES: images and labels."""
    dataset, rows = subset.dataset, torch.as_tensor(list(subset.indices))
    labels = dataset.labels[rows]
    first = [(labels == c).nonzero()[0] for c in range(n_classes) if (labels == c).any()]
    return dataset[rows[torch.cat(first[:SAMPLES])]]


def states_of(module, views):
    """States (T + 1, B, n, K, d), on the CPU, without touching the training."""
    training = module.training
    module.eval()
    with torch.no_grad():
        states = module.model.states(views).float().cpu()
    module.train(training)
    return states


def log_pictures(logger, paths, step):
    """Give pictures, names to paths of PNG files, to a logger that takes any."""
    kind = type(logger).__name__
    for name, path in paths.items():
        if kind == "WandbLogger":
            logger.log_image(name, [str(path)], step=step)
        elif kind == "TensorBoardLogger":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")


class Window:
    """A window or page that shows a picture file, by matplotlib's backend; a process of its own.

    Args:
        path: of the file, which is there already.
    """

    def __init__(self, path):
        program = Path(__file__).with_name("islands_window.py")
        alone = {"start_new_session": True} if os.name == "posix" else {}  # not for Ctrl-C
        self.process = subprocess.Popen(
            [sys.executable, program, path],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **alone,
        )

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def is_there_a_screen():
    """Whether matplotlib would show something here, in a window or, as webagg, on a page."""
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    return matplotlib.get_backend().lower() in windows

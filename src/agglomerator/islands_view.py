"""The live view of islands: a window, a page in the browser, files, an animation, the logger."""

import asyncio
import shutil
import threading
import time

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
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
        self.screen = None
        self.on = True

    def setup(self, trainer, module, stage):
        self.on = trainer.is_global_zero
        if self.on and isinstance(trainer.strategy, FSDPStrategy):
            say("--plot_islands: not while the weights lie in pieces (fsdp); --mode=islands after.")
            self.on = False

    def on_train_start(self, trainer, module):
        self.began = self.drawn_at = time.perf_counter()
        self.spent = self.longest = 0.0
        for frame in self._frames() if self.on else ():
            if int(frame.stem) > trainer.global_step:  # of a training that this one does not go on
                frame.unlink()
        self._show(trainer, module)

    def on_train_batch_end(self, trainer, module, *batch):
        if self._due():
            self._show(trainer, module)
        self._answer()

    def on_validation_batch_end(self, trainer, module, *batch):
        self._answer()

    def on_validation_end(self, trainer, module):
        if trainer.state.fn == "fit" and self._due():
            self._show(trainer, module, log=True)

    def on_train_end(self, trainer, module):
        self._show(trainer, module, log=True)
        self._animate()

    def on_exception(self, trainer, module, exception):
        self._animate()

    def on_test_end(self, trainer, module):
        self._show(trainer, module, test=True, log=True)

    def teardown(self, trainer, module, stage):
        if self.screen is not None:
            self.screen.close()
            self.screen = None

    def _due(self):
        """Whether a picture fits into the share of the time that is for pictures."""
        now = time.perf_counter()
        allowed = SHARE * (now - self.began)
        return now - self.drawn_at >= SECONDS and self.spent + self.longest <= allowed

    def _answer(self):
        if self.on and self.screen is not None:
            began = time.perf_counter()
            self._on_screen("answer")
            self.spent += time.perf_counter() - began

    def _show(self, trainer, module, test=False, log=False):
        if not self.on:
            return
        began = time.perf_counter()
        try:
            self._draw(trainer, module, test, log)
        except OSError as error:  # no reason to end a training
            say(f"--plot_islands: {error.filename}: {error.strerror}; no more pictures.")
            self.on = False
        self.drawn_at = time.perf_counter()
        if not test:
            self.longest = max(self.longest, self.drawn_at - began)
            self.spent += self.drawn_at - began

    def _draw(self, trainer, module, test, log):
        data = module.data
        subset = data.test if test or not len(data.val) else data.val
        images, labels = samples(subset, len(data.classes))
        states = states_of(module, data.view(images.to(module.device)))
        names = [data.classes[label] for label in labels]
        if test:
            name, when = f"{self.stage}_test", "test images"
        else:
            epoch, step = trainer.current_epoch, trainer.global_step
            name, when = self.stage, f"{self.stage} training, epoch {epoch + 1}, step {step}"
        title = f"Islands of agreement, {data.settings.dataset}, {when}"
        sheets = self.album.sheets(data.crop(images), names, states, title)
        paths = self.album.write(name, *sheets)
        if not test:
            self._keep_frame(paths[0], trainer.global_step)
        if self.screen is None:
            self.screen = screen()
        self._on_screen("show", sheets[0])
        if log:
            for logger in trainer.loggers:
                log_pictures(
                    logger,
                    dict(zip(("islands", "iterations"), paths, strict=True)),
                    step=trainer.global_step,
                )

    def _on_screen(self, what, *sheet):
        try:
            getattr(self.screen, what)(*sheet)
        except Exception as error:  # desktops have errors of their own, no reason to end a training
            say(f"--plot_islands: {' '.join(str(error).split())}; pictures go to files alone.")
            self.screen = Nowhere()

    def _frames(self):
        return sorted(self.frames.glob("[0-9]" * 10 + ".png"))

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
        frames = self._frames() if self.on else []
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


def screen():
    """Where pictures are shown here: a window, a page, or nowhere."""
    backend = matplotlib.get_backend().lower()
    windows = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    if backend not in windows:
        return Nowhere()
    return Page() if backend == "webagg" else Window()


class Nowhere:
    """No display."""

    def show(self, sheet):
        """Show a picture: a function that draws into a figure."""

    def answer(self):
        """Let the user's mouse and keys have their effect."""

    def close(self):
        """Take it away."""


class Window(Nowhere):
    """A window of the desktop. It can be closed; it does not come back then."""

    def __init__(self):
        self.figure = None

    def show(self, sheet):
        if self.figure is None:
            self.figure = plt.figure("Islands of agreement", layout="constrained")
            self.figure.set_size_inches(*sheet(self.figure))
            plt.show(block=False)
        elif self._open():
            sheet(self.figure)
            self.figure.canvas.draw_idle()
        self.answer()

    def answer(self):
        if self._open():
            self.figure.canvas.flush_events()

    def close(self):
        if self.figure is not None:
            plt.close(self.figure)

    def _open(self):
        return plt.fignum_exists(self.figure.number)


class Page(Nowhere):
    """A page that matplotlib serves to browsers. A thread of its own answers them and draws, so
    that it does so while a step is computed."""

    loop = None  # of the one server of this process

    def __init__(self):
        self.figure = None
        if Page.loop is None:
            ready = threading.Event()
            threading.Thread(target=asyncio.run, args=(self._serve(ready),), daemon=True).start()
            ready.wait()

    @staticmethod
    async def _serve(ready):
        from matplotlib.backends.backend_webagg import WebAggApplication as Server

        try:
            Server.initialize()
            Page.loop = asyncio.get_running_loop()
            say(
                f"Islands live: http://{Server.address}:{Server.port} (from another machine after: "
                f"ssh -L {Server.port}:{Server.address}:{Server.port} HOST)"
            )
        except (OSError, SystemExit) as error:
            say(f"--plot_islands: no page ({error}).")
        finally:
            ready.set()
        await asyncio.Event().wait()

    def show(self, sheet):
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._draw, sheet)

    def _draw(self, sheet):
        if self.figure is None:
            self.figure = plt.figure("Islands of agreement", layout="constrained")
            self.figure.set_size_inches(*sheet(self.figure))
        else:
            sheet(self.figure)
        self.figure.canvas.draw_idle()

    def close(self):
        if self.loop is not None:
            self.loop.call_soon_threadsafe(lambda: plt.close(self.figure))

"""The live view of islands: a window, a page in the browser, files, an animation, the logger."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback

from agglomerator.islands import window
from agglomerator.islands.figures import IslandFigures, animate, kept_arrays
from agglomerator.util.files import written_whole
from agglomerator.util.terminal import say

SAMPLES = 6
SECONDS = 20  # between two pictures, or more, so that they take no more than
SHARE = 0.02  # of the time
FIRST = 2  # seconds until the second picture; until the next ones each time twice as many
EARLY = 3  # seconds that pictures may take before they fit into their share
MOST_FRAMES = 60
ANSWER = 30  # seconds that a window has to answer


class IslandsView(Callback):
    """Shows the islands of the same sample images during training, validation and test.

    A first picture before training and a last one after it; in between some soon, then no more than
    `SHARE` of the time goes into pictures. Each is written into the folder, where the last of them
    make an animation, and shown in a window or a page where there is one, which never holds up the
    run.

    Colours are made for what the trained network tells apart: where the folder has no projection
    yet, pictures have provisional colours, and are drawn again at the end of training.

    Args:
        folder: for the pictures and for the projection, which later runs into the same folder use.
        stage: name of the stage, for file names.
        threshold: least cosine of neighbours of one island.
    """

    def __init__(self, folder, stage, threshold):
        self.album, self.stage = IslandFigures(folder, threshold), stage
        self.frames = folder / "frames" / stage
        self.samples = None
        self.provisional = False
        self.on = True

    def setup(self, trainer, module, stage):
        self.on = trainer.is_global_zero

    def on_train_start(self, trainer, module):
        self.spent = 0.0
        self._try(self._drop_frames, trainer.global_step)
        self._show(trainer, module)
        self.began, self.spent = self.drawn_at, 0.0

    def on_train_batch_end(self, trainer, module, *batch):
        if self._due():
            self._show(trainer, module)

    def on_validation_end(self, trainer, module):
        if self._due():
            self._show(trainer, module, log=True)

    def on_train_end(self, trainer, module):
        self._try(self._recolour, module)
        self._show(trainer, module, log=True)
        self._try(self._animate)

    def on_exception(self, trainer, module, exception):
        self._try(self._animate)

    def on_test_end(self, trainer, module):
        self._show(trainer, module, test=True, log=True)

    def _due(self):
        """Whether to draw: soon at first, then ever later, then as pictures fit into their share of
        the time."""
        now = time.perf_counter()
        waited, cost = now - self.drawn_at, self.spent + self.last
        allowed = SHARE * (now - self.began) / (2 if self.provisional else 1)  # drawn again
        early = waited >= max(FIRST, self.drawn_at - self.began) and cost <= EARLY
        return early or (waited >= SECONDS and cost <= allowed)

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
        images, names, states = self._look(module, test)
        if test:
            name, when = f"{self.stage}_test", "test images"
        else:
            name, step = self.stage, trainer.global_step
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs)
            when = f"{self.stage} training, epoch {epoch}, step {step}"
            when = when if step else "before training"
            if self.album.projection is None and not self.album.open(states):
                self.provisional = True
                self.album.fit(states[-1], keep=False)
        title = f"Islands of agreement, {module.settings.exp_name}\n{when}"
        note = "\nprovisional colours" if self.provisional else ""
        sheets = self.album.figures(images, names, states, title + note)
        paths = {"islands": self.album.write(name, sheets[0])}
        if not test:
            self._keep_frame(paths["islands"], trainer.global_step, states[-1], title)
        WINDOW.show(paths["islands"])
        if log:
            paths["iterations"] = self.album.write(f"{name}_iterations", sheets[1])
            for logger in trainer.loggers:
                log_pictures(logger, paths, trainer.global_step)

    def _look(self, module, test=False):
        """The sample images, their names, and their states (T + 1, B, n, K, d)."""
        data = module.data
        if self.samples is None:
            subset = data.test if test or not len(data.val) else data.val
            self.samples = samples(subset, len(data.classes))
        images, labels = self.samples
        states = states_of(module, data.view(images.to(module.device)))
        return data.crop(images), [data.classes[label] for label in labels], states

    def _recolour(self, module):
        """Fit the projection to the trained network; draw the frames of the training again."""
        if not self.provisional:
            return
        images, names, states = self._look(module)
        self.provisional = False
        self.album.fit(states[-1])
        for frame in self._frames():
            kept = kept_arrays(frame.with_suffix(".npz"), ("states", "title"))
            if kept is not None:
                states = torch.from_numpy(kept["states"]).float()[None]
                sheets = self.album.figures(images, names, states, str(kept["title"]))
                self.album.write(frame.relative_to(self.album.folder).with_suffix(""), sheets[0])
                frame.with_suffix(".npz").unlink()

    def _frames(self):
        return sorted(self.frames.glob("[0-9]" * 10 + ".png"))

    def _drop_frames(self, step):
        """Drop those after a step: of a training that this one does not go on with."""
        for frame in self._frames():
            if int(frame.stem) > step:
                self._drop_frame(frame)

    def _drop_frame(self, frame):
        frame.unlink()
        frame.with_suffix(".npz").unlink(missing_ok=True)

    def _keep_frame(self, picture, step, states, title):
        """Keep a picture for the animation; at most `MOST_FRAMES`, evenly over the training. One in
        provisional colours is kept with what it takes to draw it again."""
        self.frames.mkdir(parents=True, exist_ok=True)
        frame = self.frames / f"{step:010d}.png"
        shutil.copyfile(picture, frame)
        if self.provisional:
            with written_whole(frame.with_suffix(".npz"), "wb") as file:
                np.savez(file, states=states.half().numpy(), title=title)
        frames = self._frames()
        if len(frames) > MOST_FRAMES:
            steps = [int(frame.stem) for frame in frames]
            gaps = [after - before for before, after in zip(steps[:-2], steps[2:], strict=True)]
            self._drop_frame(frames[1 + gaps.index(min(gaps))])

    def _animate(self):
        frames = self._frames()
        if len(frames) > 1:
            animate(frames, self.album.folder / f"{self.stage}.gif")


def samples(subset, n_classes):
    """The first image of each of the first classes, at most SAMPLES: images and labels."""
    dataset, rows = subset.dataset, torch.as_tensor(list(subset.indices))
    of_classes = ((dataset.labels[rows] == c).nonzero() for c in range(n_classes))
    first = islice((found[0] for found in of_classes if len(found)), SAMPLES)
    return dataset[rows[torch.cat(list(first))]]


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
    """The window or page of a run, by matplotlib's backend, through all of its stages; a process of
    its own. Set `wanted` for it to open with the first picture; the user may close it any time.
    """

    def __init__(self):
        self.wanted, self.process = False, None

    def show(self, path):
        """Show a picture file, which is there already."""
        if self.wanted and self.process is None:
            self._open(path)
        else:
            self._tell(show=str(path.absolute()))

    def stay(self):
        """At the end of the run leave the window to the user. Where the run has the foreground of a
        terminal, wait for Ctrl-C while there is a page."""
        if self.process is not None:
            waits = is_in_foreground()
            self._tell(stay=waits)
            with suppress(KeyboardInterrupt):
                self.relay.join(None if waits else ANSWER)
            self.process.stdin.close()

    def _open(self, path):
        program = Path(window.__file__)
        alone = {"start_new_session": True} if os.name == "posix" else {}  # not for Ctrl-C
        self.process = subprocess.Popen(
            [sys.executable, program, path.absolute()],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **alone,
        )
        self.relay = Thread(target=self._relay, daemon=True)
        self.relay.start()

    def _relay(self):
        for line in self.process.stdout:
            say(line.decode(errors="replace").rstrip())

    def _tell(self, **what):
        if self.process is not None:
            with suppress(OSError):  # the user has closed it
                self.process.stdin.write(json.dumps(what).encode() + b"\n")


WINDOW = Window()


def is_in_foreground():
    """Whether somebody sits before the run, and can end it by Ctrl-C."""
    streams = sys.stdin, sys.stdout
    if not all(stream is not None and stream.isatty() for stream in streams):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except AttributeError:  # Windows
        return True
    except OSError:  # another session's terminal
        return False
